"""Another forward pass in the place of a module's own, until the context ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn


@contextlib.contextmanager
def patched(module: nn.Module, wrap: Callable[[Callable[..., object]], Callable[..., object]]) -> Iterator[None]:
    """Run ``wrap(forward)`` for ``module.forward`` while the context lasts; patches may lie over one another."""
    before = vars(module).get("forward")  # of the instance: that of its class is not touched
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
