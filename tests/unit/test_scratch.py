"""Scratch tensors behave like any other, and leave nothing behind."""

import os
import tempfile

import psutil
import pytest
import torch

from moescope import scratch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.long])
@pytest.mark.parametrize("shape", [(3, 5), (700, 400, 3)], ids=["small", "mapped"])
def test_a_scratch_tensor_holds_what_is_put_in(shape, dtype):
    like = torch.zeros(1, dtype=dtype)
    found = scratch.empty(shape, like)
    assert (found.shape, found.dtype) == (torch.Size(shape), dtype)
    values = torch.arange(found.numel()).view(shape).to(dtype)
    found[:] = values
    assert torch.equal(found, values)
    assert torch.equal(found[:, 1:3].clone(), values[:, 1:3])


def test_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = scratch.empty((1024, 1024), torch.zeros(1))
    assert os.listdir(tmp_path) == []
    found[:] = 1
    assert found.sum() == 1024**2


@pytest.mark.skipif(not psutil.LINUX, reason="reads how memory is held from /proc")
def test_a_large_one_is_no_anonymous_memory(tmp_path, monkeypatch):
    def anonymous():
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = anonymous()
    found = scratch.empty((64, 2**20), torch.zeros(1))  # 256 MB
    found.fill_(1.0)
    assert anonymous() - before < 64 * 2**20
