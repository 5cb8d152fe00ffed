"""How the kernels become torch ops, and how their functional forms call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convsurgery.geometry import pad_amounts, pair
from convsurgery.operators.library import define_op

_HEAD = "Tensor input, Tensor weight, Tensor? bias"
_WINDOW = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"


def schema(hyper: str, attributes: str) -> str:
    """The argument list all kernels share, around their hyperparameter and attributes."""
    return _signature(_HEAD, hyper, "Tensor? gain, Tensor? scale", attributes, "bool centered", _WINDOW)


def _signature(*parts: str) -> str:
    return f"({', '.join(part for part in parts if part)}) -> Tensor"


def define(name: str, hyper: str, attributes: str, function: Callable[..., Tensor]) -> None:
    """Define ``convsurgery::name`` by its body of torch ops."""
    define_op(name + schema(hyper, attributes), function)


def define_dial(name: str, hyper: str, attributes: str, function: Callable[..., Tensor]) -> None:
    """Define ``convsurgery::name``, a kernel in the form that is the convolution where ``epsilon`` is 0."""
    define_op(name + _signature(_HEAD, "Tensor? gain, Tensor epsilon", hyper, attributes, _WINDOW), function)


def as_constant(value: float | Tensor, weight: Tensor) -> Tensor:
    """A hyperparameter given as a number or a tensor, as a tensor beside ``weight``, in at least float32."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)


def functional_call(
    op: Any,
    arguments: tuple[Any, ...],
    window: tuple[int | tuple[int, int], str | int | tuple[int, int], int | tuple[int, int], int],
) -> Tensor:
    """Call an op in the manner of ``F.conv2d``: numbers or pairs, "same" or "valid", batch dimension optional."""
    x, weight, *rest = arguments
    stride, padding, dilation, groups = window
    if padding == "same" and pair(stride) != (1, 1):
        raise ValueError("padding='same' needs stride 1")
    left, right, top, bottom = pad_amounts(padding, (weight.shape[-2], weight.shape[-1]), pair(dilation))
    if (left, top) != (right, bottom):
        # As torch does it for "same": only the odd pixel is added to the image.
        x = F.pad(x, [0, right - left, 0, bottom - top])
    out: Tensor = op(x, weight, *rest, pair(stride), (top, left), pair(dilation), groups)
    return out
