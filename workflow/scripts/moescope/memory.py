"""Memory of a scoring job: planned from shapes before the start, and kept by the process while it works."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch import nn

from moescope.clean import BATCH_TOKENS
from moescope.decomposition import Decomposition, layers_of
from moescope.errors import MoescopeError
from moescope.lpi import projected_elements

#: What a process holds before it has loaded anything: libraries and their tables (bytes, measured).
PROCESS = 500 * 2**20
#: Tiles, buffers and scores of one site that come and go (bytes, measured).
WORK = 300 * 2**20
#: How much freed memory the process keeps (``keep_pages``).
KEPT = 2**30
#: Fewer prompts than these are not scored together: the time would go into projecting neurons again and again.
LEAST = 16
#: Numbers of an allocator of the GNU C library: where its heap ends, and from what size on it asks the kernel.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


class MemoryPlanError(MoescopeError):
    """A model or its prompts do not fit into the memory that a job may use."""


@dataclass(frozen=True)
class Shape:
    """What memory depends on: ``vocabulary``, ``hidden``, the most ``neurons`` that are projected together, and in
    bytes the largest ``layer`` in float32 and what a ``token`` leaves in it while it runs."""

    vocabulary: int
    hidden: int
    neurons: int
    layer: int
    token: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """Of a loaded model."""
        vocabulary, hidden = model.get_output_embeddings().weight.shape
        layers = [sum(4 * p.numel() for p in layer.parameters()) for layer in layers_of(model)]
        neurons = max((site.neurons for site in Decomposition(model).sites), default=0)
        experts = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
        token = 4 * (8 * hidden + experts * (2 * hidden + 3 * neurons))
        return cls(vocabulary, hidden, neurons, max(layers, default=0), token)


@dataclass(frozen=True)
class Plan:
    """How many ``prompts`` are scored together, and how many ``bytes`` that takes at the most."""

    prompts: int
    bytes: int


def plan(shape: Shape, prompts: int, mem_mb: int | None = None, local: bool = False) -> Plan:
    """The most prompts that can be scored together in ``mem_mb`` (what is free now: None), with the norm ``local`` or
    not.

    Anonymous memory: weights are mapped from disk and the trace of a forward pass lies in a temporary file, so that the
    kernel may let go of both. Raises MemoryPlanError where not even ``LEAST`` prompts fit.
    """
    limit = available() if mem_mb is None else mem_mb * 2**20
    forward = shape.layer + BATCH_TOKENS * shape.token
    # the unembedding stands there as it is and with its rows centred
    scoring = 4 * (2 * shape.vocabulary * shape.hidden + projected_elements(shape.neurons, shape.vocabulary))
    largest = max(forward, scoring)
    fixed = PROCESS + WORK + 4 * prompts * shape.vocabulary + largest + min(largest, KEPT)
    each = 4 * shape.vocabulary * (2 if local else 1)  # probabilities; and, norm local, the logits
    least = min(prompts, LEAST)
    if fixed + least * each > limit:
        need = -(-(fixed + least * each) // 2**20)
        raise MemoryPlanError(
            f"scoring needs {need:,} MB of memory and may use {limit // 2**20:,} MB: "
            "give the job more (mem_mb of the profile) or name fewer relations"
        )
    together = min(prompts, (limit - fixed) // each)
    blocks = -(-prompts // together) if prompts else 1
    together = -(-prompts // blocks)
    return Plan(together, fixed + together * each)


def available() -> int:
    """Bytes that this process may still use: what is free, or what its control group leaves it (Linux, v2)."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such files, or no limit: "max"
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def keep_pages() -> None:
    """Let the process keep the memory it frees, up to a gigabyte: memory that is new to a process has to be cleared by
    the kernel first, which took a third of the time of scoring. Elsewhere than on the GNU C library, nothing."""
    if mallopt := _of_c_library("mallopt"):
        mallopt(_MMAP_THRESHOLD, 64 * 2**20)
        mallopt(_TRIM_THRESHOLD, KEPT)


def release_pages() -> None:
    """Give back the memory that was kept: what comes next has another allocator (tables are made by polars)."""
    if malloc_trim := _of_c_library("malloc_trim"):
        malloc_trim(0)


def _of_c_library(name: str) -> Callable[..., int] | None:
    """A function of the GNU C library, None where there is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
