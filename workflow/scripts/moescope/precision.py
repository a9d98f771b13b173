"""Float32 computation on weights stored in any dtype, one block of the model in float32 at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from moescope.decomposition import layers_of


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 tensors in full float32: TF32 and bfloat16 shortcuts off, settings restored after.

    Of matrices, and of convolutions too, which some families have beside or instead of attention and which cuDNN does
    in TF32 unless told otherwise. (What may be cut short in products of bfloat16 or float16 tensors does not matter:
    there are none.) Raises RuntimeError where shortcuts stay on, be it by autocast.
    """
    products = torch.get_float32_matmul_precision()
    others = [(operation, operation.fp32_precision) for operation in _beside_matrix_products()]
    try:
        torch.set_float32_matmul_precision("highest")
        for operation, _ in others:
            operation.fp32_precision = "ieee"
        settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, *_beside_matrix_products())
        shortcut = any(operation.fp32_precision != "ieee" for operation in settings)
        cast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        if shortcut or cast or torch.get_float32_matmul_precision() != "highest":
            raise RuntimeError("float32 products are not exact: another library switches TF32 or bfloat16 on")
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        for operation, before in others:
            operation.fp32_precision = before


def _beside_matrix_products() -> tuple:
    """The settings of torch for the other operations that have shortcuts; of cuDNN both, or it calls them mixed up."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return cudnn.conv, cudnn.rnn, mkldnn.conv, mkldnn.rnn


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
    stored: dict[nn.Module, list] = {}

    def up(module: nn.Module, *_: object) -> None:
        stored[module] = [(p, p.data) for p in module.parameters() if p.is_floating_point()]
        for parameter, data in stored[module]:
            parameter.data = data.float()

    def down(module: nn.Module, *_: object) -> None:
        for parameter, data in stored.pop(module, ()):
            parameter.data = data

    handles = []
    for module in (*owners, *layers):
        if type(module) is nn.Embedding:  # no heir, which may compute with what it looks up
            handles.append(module.register_forward_hook(_widened, prepend=True))
        elif any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
            # first in: pre-hooks of others run after this one and see the float32 weights
            handles.append(module.register_forward_pre_hook(up, prepend=True))
            handles.append(module.register_forward_hook(down, always_call=True))
    try:
        with exact_products():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(stored):  # an interrupt skips even the hooks that are always called
            down(module)


def _widened(_: nn.Module, __: object, rows: torch.Tensor) -> torch.Tensor:
    return rows.float()
