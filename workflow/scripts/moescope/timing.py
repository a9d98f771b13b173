"""Where the time of a job goes, and how fast the machine could be."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import torch


class Stages:
    """Seconds by stage: ``with stages("forward"): ...``; a stage that comes again adds up."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = _now()
        try:
            yield
        finally:
            self.seconds[name] += _now() - start

    def rounded(self) -> dict[str, float]:
        """The same for a record: tenths of a millisecond say enough."""
        return {name: round(seconds, 4) for name, seconds in self.seconds.items()}


def _now() -> float:
    """Seconds of a clock that never goes back, with nothing left to do on the GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()


def gemm_rate(device: torch.device, size: int = 1_024, times: int = 4) -> float:
    """Operations a second of a plain float32 matrix product on this machine, the best of a few."""
    a, b = (torch.ones(size, size, device=device) for _ in range(2))
    out, best = a @ b, float("inf")
    for _ in range(times):
        start = _now()
        torch.mm(a, b, out=out)
        best = min(best, _now() - start)
    return 2 * size**3 / best
