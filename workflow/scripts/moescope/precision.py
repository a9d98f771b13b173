"""Float32 computation on weights stored in any dtype, one block of the model in float32 at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from moescope.decomposition import layers_of

#: Stored weights by the memory of the float32 copies that stand in for them right now.
_STORED: dict[int, torch.Tensor] = {}


def stored(weight: torch.Tensor) -> torch.Tensor | None:
    """The stored tensor whose float32 copy this is a view of; None where it is none."""
    return _STORED.get(weight.untyped_storage().data_ptr())


class _Wide:
    """A module in float32 until it is told to ``narrow``."""

    def __init__(self, module: nn.Module):
        self.stored = [(p, p.data) for p in module.parameters() if p.is_floating_point() and p.dtype != torch.float32]
        for parameter, data in self.stored:
            parameter.data = data.float()
            _STORED[parameter.untyped_storage().data_ptr()] = data

    def narrow(self) -> None:
        """Give the stored tensors back."""
        for parameter, data in self.stored:
            del _STORED[parameter.untyped_storage().data_ptr()]
            parameter.data = data
        self.stored = []


@contextlib.contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Keep a block in float32 over all its runs within the context, instead of upcasting it for each."""
    wide = _Wide(module)
    try:
        yield
    finally:
        wide.narrow()


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 tensors in full float32: TF32 and bfloat16 shortcuts off, settings restored after.

    Of matrices, and of convolutions too, which some families have beside attention and which cuDNN does in TF32 unless
    told otherwise. (Shortcuts in products of bfloat16 or float16 tensors do not matter: there are none.) Raises
    RuntimeError where they stay on, be it by autocast.
    """
    with _exact_convolutions():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            shortcut = torch.backends.cuda.matmul.allow_tf32 or torch.backends.mkldnn.matmul.fp32_precision != "ieee"
            cast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
            if shortcut or cast or torch.get_float32_matmul_precision() != "highest":
                raise RuntimeError("float32 products are not exact: another library switches TF32 or bfloat16 on")
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    operations = (cudnn.conv, cudnn.rnn, torch.backends.mkldnn.conv)
    before = [operation.fp32_precision for operation in operations]

    def switch(*settings: str) -> None:
        # the old switch of cuDNN has to agree with the two new ones, or reading it is an error
        cudnn.allow_tf32 = settings[:2] == ("tf32", "tf32")
        for operation, setting in zip(operations, settings, strict=True):
            operation.fp32_precision = setting

    switch("ieee", "ieee", "ieee")
    try:
        yield
    finally:
        switch(*before)


@contextlib.contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Upcast each layer, norm and head just while it runs; the stored tensors come back after it. Of an embedding, the
    rows that are looked up.

    Bit-identical to a float32 model of the same weights, at the memory of one block. A model stored in float32 is left
    alone. (Never cast a model as a whole: that would round its rotary buffers.)
    """
    layers = set(layers_of(model))
    inside = {m for layer in layers for m in layer.modules()}
    owners = [m for m in model.modules() if m not in inside and next(m.parameters(recurse=False), None) is not None]
    wide: dict[nn.Module, _Wide] = {}

    def up(module: nn.Module, *_: object) -> None:
        wide[module] = _Wide(module)

    def down(module: nn.Module, *_: object) -> None:
        if module in wide:
            wide.pop(module).narrow()

    handles = []
    for module in (*owners, *layers):
        if not any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
            continue
        if type(module) is nn.Embedding:  # no heir of it, which may compute with what it looks up
            handles.append(module.register_forward_hook(_widened, prepend=True))
        else:
            # first in: pre-hooks of others run after this one and see the float32 weights
            handles.append(module.register_forward_pre_hook(up, prepend=True))
            handles.append(module.register_forward_hook(down, always_call=True))
    try:
        with exact_products():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(wide):  # an interrupt skips even the hooks that are always called
            down(module)


def _widened(_: nn.Module, __: object, rows: torch.Tensor) -> torch.Tensor:
    return rows.float()
