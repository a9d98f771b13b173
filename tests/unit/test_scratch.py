"""Scratch tensors behave like any other, and leave nothing behind."""

import errno
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


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    def full(handle, start, size):
        assert (start, size) == (0, 4 * 1024**2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    before = len(os.listdir("/proc/self/fd")) if psutil.LINUX else 0
    with pytest.raises(scratch.ScratchError, match=rf"{tmp_path}: no room for 4 MB .* TMPDIR"):
        scratch.empty((1024, 1024), torch.zeros(1))
    assert os.listdir(tmp_path) == []
    assert not psutil.LINUX or len(os.listdir("/proc/self/fd")) == before


def test_a_file_system_that_cannot_reserve_room_serves(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unable, raising=False)
    assert scratch.empty((1024, 1024), torch.zeros(1)).fill_(2).sum() == 2 * 1024**2


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
