"""Pairs of an attention head and a routed expert that it may drive. Standard library only."""

from __future__ import annotations

import re
from typing import NamedTuple

from moescope.errors import MoescopeError

_LABEL = re.compile(r"H\((\d+),(\d+)\)-E\((\d+),(\d+)\)")


class PairError(MoescopeError):
    """A pair that cannot be what it says."""


class Pair(NamedTuple):
    """A head and an expert, each by its layer and its number there, from 0."""

    head_layer: int
    head: int
    layer: int
    expert: int

    @property
    def label(self) -> str:
        """As in ``H(19,12)-E(20,59)``."""
        return f"H({self.head_layer},{self.head})-E({self.layer},{self.expert})"

    @classmethod
    def of(cls, label: str) -> Pair:
        """The pair of a label. Raises PairError where it is none."""
        found = _LABEL.fullmatch(label)
        if found is None:
            raise PairError(f"{label!r} names no pair; write it as in H(19,12)-E(20,59)")
        return cls(*map(int, found.groups()))

    def require_causal(self) -> None:
        """Raises PairError where the head lies in a layer after its expert, and so cannot feed it."""
        if self.head_layer > self.layer:
            raise PairError(
                f"head {self.head} of layer {self.head_layer} lies after expert {self.expert} of layer {self.layer}, "
                f"which it cannot drive; name a head of layer {self.layer} or before"
            )
