"""Tensors that outlive a step but need not stay in memory: what a forward pass left at the last positions."""

from __future__ import annotations

import errno
import math
import os
import tempfile

import torch
from torch import Tensor

from moescope.errors import MoescopeError

#: Tensors below this size are not worth a file.
_LEAST = 2**20


class ScratchError(MoescopeError):
    """The temporary folder is full."""


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of a shape, with the dtype and device of another.

    On the CPU it is mapped from a file without a name in the temporary folder (``TMPDIR``), so that the kernel writes
    it out where memory is short; the file goes with the tensor. A temporary folder that is itself kept in memory
    (tmpfs) saves nothing: name one on a disk. Raises ScratchError where it has no room.
    """
    elements = math.prod(shape)
    if like.device.type != "cpu" or elements * like.element_size() < _LEAST:
        return like.new_empty(shape)
    handle, path = tempfile.mkstemp(prefix="moescope-")
    try:
        with open(handle, "wb") as file:
            _reserve(file.fileno(), elements * like.element_size())
        return torch.from_file(path, shared=True, size=elements, dtype=like.dtype).view(shape)
    finally:
        os.unlink(path)  # a mapped file lives on until nobody uses it


def _reserve(handle: int, size: int) -> None:
    """Take the room on the disk now: a mapped file that cannot grow ends the process, without a word."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ScratchError(
                f"{tempfile.gettempdir()}: no room for {size / 1e6:,.0f} MB of what a forward pass leaves; "
                "make room or name a folder on another disk in TMPDIR"
            ) from error
