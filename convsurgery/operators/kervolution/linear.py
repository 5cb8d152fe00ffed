"""Linear kervolution: wᵀx, the convolution itself, Wang et al. 2019, eq. 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from convsurgery.geometry import Site
from convsurgery.operators.base import Built, OperatorConfig, Start, register_operator
from convsurgery.operators.kervolution import _onnx as text
from convsurgery.operators.kervolution._call import define, functional_call
from convsurgery.operators.kervolution._conv import Window, affine, inner, overwritable
from convsurgery.operators.kervolution._layer import Kervolution2d
from convsurgery.operators.onnx import NodeForm, OnnxFunction
from convsurgery.operators.precision import result_dtype

__all__ = ["KervLinear", "LinearKervolution2d", "kerv_linear"]


def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    scale: Tensor | None,
    centered: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    window = Window(stride, padding, dilation, groups)
    if gain is None and scale is None:
        # The very call that Conv2d makes: bit-equal to it.
        return torch.nn.functional.conv2d(x, weight, bias, *window)
    s = inner(x, weight, window, scale)
    return affine(s, gain, bias, overwritable(x, weight, bias, gain, scale)).to(result_dtype(x))


define("kerv_linear", "", "", _op)


def kerv_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    gain: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Linear kervolution, ``wᵀx + bias``: the convolution, bit for bit.

    Wang et al., *Kervolutional Neural Networks* (2019), eq. 2. Shapes, options and constants as
    :func:`~convsurgery.functional.kerv_poly`.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> torch.equal(CF.kerv_linear(x, w, padding=1), torch.nn.functional.conv2d(x, w, padding=1))
        True
    """
    return functional_call(
        torch.ops.convsurgery.kerv_linear,
        (input, weight, bias, gain, scale, False),
        (stride, padding, dilation, groups),
    )


class LinearKervolution2d(Kervolution2d):
    """Layer form of :func:`kerv_linear`; options as :class:`torch.nn.Conv2d`."""

    op_name = "kerv_linear"


def _body(form: NodeForm) -> list[str]:
    return text.statements(text.conv("s", "X", "W"), text.affine("s", form))


@register_operator("kerv-linear")
@dataclass(frozen=True)
class KervLinear(OperatorConfig):
    """Linear kervolution as a rule's target: ``kerv-linear``."""

    summary: ClassVar[str] = "the linear kernel: the convolution itself"
    formula: ClassVar[str] = "wᵀx"
    source: ClassVar[str] = "Wang et al. 2019, eq. 2"
    starts: ClassVar[dict[str, str]] = {"copy": "exact", "random": "none"}
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "LinearKervolution2d", "kerv_linear", ("input", "weight", "bias", "gain"), ("centered",), text.traits, _body
    )

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        return LinearKervolution2d.like(conv, centered=False).begin(start, None, absorb=absorb)
