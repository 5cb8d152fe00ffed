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
_TAIL = "bool centered, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"


def schema(hyper: str, attributes: str) -> str:
    """The argument list all kernels share, around their hyperparameter and attributes."""
    parts = [_HEAD, hyper, "Tensor? gain, Tensor? scale", attributes, _TAIL]
    return f"({', '.join(part for part in parts if part)}) -> Tensor"


def define(name: str, hyper: str, attributes: str, function: Callable[..., Tensor]) -> None:
    """Define ``convsurgery::name`` by its body of torch ops."""
    define_op(name + schema(hyper, attributes), function)


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
        x, left, top = F.pad(x, [left, right, top, bottom]), 0, 0
    out: Tensor = op(x, weight, *rest, pair(stride), (top, left), pair(dilation), groups)
    return out
