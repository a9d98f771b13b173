"""MoEscope: where in a language model a piece of knowledge lives, when it settled, and what breaks without it.

Submodules are imported on first use, so that statistics and plots never pay for torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_FUNCTIONS = {"load": "models", "attribute": "attribution", "ablate": "ablation"}


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"moescope.{_FUNCTIONS[name]}"), name)
    try:
        return importlib.import_module(f"moescope.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"moescope.{name}":
            raise
        raise AttributeError(f"module 'moescope' has no attribute {name!r}") from None
