"""Training steps: in the names of directories, and those that a configuration selects of a series."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moescope.errors import MoescopeError

_STEP = re.compile(r"(?:^|[^a-z])(?:global[-_]?)?(?:step|checkpoint|ckpt|iter(?:ation)?)[-_=]?0*(\d+)", re.IGNORECASE)


class StepError(MoescopeError):
    """A selection of steps that a series does not have."""


def step_of(name: str) -> int:
    """The training step in a directory's name (``step1000-tokens4B``, ``checkpoint-500``, ``1000``); 0 without one."""
    if name.isdecimal():
        return int(name)
    match = _STEP.search(name)
    return int(match[1]) if match else 0


def step_name(step: int | None) -> str:
    """How a step is called: its number, or ``main``."""
    return "main" if step is None else str(step)


def select(series: str, available: Iterable[int], chosen: Any = "all", paper: Sequence[int] = ()) -> list[int]:
    """The steps of a series that a ``steps`` entry of the configuration asks for, ascending.

    ``all``; ``last``; ``paper`` (those of ``paper``); a list; ``{every: n}`` (every n-th one listed, from the first);
    ``{log: n}`` (n log-spaced ones among the positive steps, each snapped to the nearest on that scale);
    ``{nearest: [..]}``; ties go to the earlier step. Raises StepError on a step that is not there, naming its
    neighbours, on a series without steps, and on ``paper`` where no paper is known.
    """
    available = sorted(available)
    if not available:
        raise StepError(f"{series}: the series has no checkpoints")
    if chosen == "all":
        return available
    if chosen == "last":
        return available[-1:]
    if isinstance(chosen, Mapping):
        ((kind, value),) = chosen.items()
        if kind == "every":
            return available[::value]
        if kind == "log":
            return _log_spaced(available, value)
        return sorted({min(available, key=lambda s: (abs(s - wanted), s)) for wanted in value})
    if chosen == "paper":
        if not paper:
            raise StepError(f"{series}: no paper reports steps of this repository; write them as a list")
        chosen = paper
    for step in chosen:
        if step not in available:
            near = sorted(sorted(available, key=lambda s: abs(s - step))[:4])
            raise StepError(
                f"{series}: step {step} is not in the series; its neighbours are {', '.join(map(str, near))}"
            )
    return sorted(set(chosen))


def _log_spaced(available: list[int], n: int) -> list[int]:
    positive = [s for s in available if s > 0] or available
    if n == 1 or len(positive) <= 1:
        return positive[-1:]
    first, last = math.log(positive[0]), math.log(positive[-1])
    wanted = [first + (last - first) * i / (n - 1) for i in range(n)]
    # rounded, because a step half-way between two others is so in exact arithmetic only
    return sorted({min(positive, key=lambda s: (round(abs(math.log(s) - w), 9), s)) for w in wanted})
