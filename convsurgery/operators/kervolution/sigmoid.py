"""Sigmoid kervolution: tanh(wᵀx), Wang et al. 2019, §4.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.geometry import Site
from convsurgery.operators.base import Built, OperatorConfig, Start, register_operator
from convsurgery.operators.kervolution import _onnx as text
from convsurgery.operators.kervolution._call import define, functional_call
from convsurgery.operators.kervolution._conv import Window, affine, inner, tanh
from convsurgery.operators.kervolution._layer import SHARE, Kervolution2d, power_of_two, quantile
from convsurgery.operators.onnx import NodeForm, OnnxFunction
from convsurgery.operators.precision import no_grad_needed, result_dtype, widened

__all__ = ["KervSigmoid", "SigmoidKervolution2d", "kerv_sigmoid"]

#: tanh of it is 0.98
_SATURATED = 2.3


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
    # tanh(0) = 0: the centred form is the plain one.
    fresh = no_grad_needed(x, weight, bias, gain, scale)
    s = inner(x, weight, Window(stride, padding, dilation, groups), scale)
    return affine(tanh(s, fresh), gain, bias, fresh).to(result_dtype(x))


define("kerv_sigmoid", "", "", _op)


def kerv_sigmoid(
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
    """Sigmoid kervolution, ``tanh(wᵀx) + bias`` for every window.

    Wang et al., *Kervolutional Neural Networks* (2019), §4.1. Shapes, options and constants as
    :func:`~convsurgery.functional.kerv_poly`; the response to an empty window is 0 already.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> torch.allclose(CF.kerv_sigmoid(x, w), torch.nn.functional.conv2d(x, w).tanh())
        True
    """
    return functional_call(
        torch.ops.convsurgery.kerv_sigmoid,
        (input, weight, bias, gain, scale, False),
        (stride, padding, dilation, groups),
    )


class SigmoidKervolution2d(Kervolution2d):
    """Layer form of :func:`kerv_sigmoid`; options as :class:`torch.nn.Conv2d`."""

    op_name = "kerv_sigmoid"
    dial = {"scale": 1, "gain": -1}

    def neutral(self, eps: float) -> Tensor:
        self.scale = self.constant(eps)
        return torch.tensor(1 / eps, dtype=torch.float64, device=self.weight.device)

    def saturation(self, input: Tensor) -> str | None:
        left, right, top, bottom = self.geometry.padding
        # With zeros around, whatever the mode: only the share of large values is asked for.
        x = widened(F.pad(input, [left, right, top, bottom]))
        window = (self.stride, (0, 0), self.dilation, self.groups)
        s = F.conv2d(x, widened(self.weight), None, *window).abs()
        scale = 1.0 if self.scale is None else float(self.scale.abs().max())
        share = float((s * scale > _SATURATED).float().mean())
        if share < SHARE:
            return None
        better = power_of_two(0.5 / max(quantile(s, 0.99), 1e-30))
        return f"saturated: {share:.0%} of tanh beyond ±0.98; by neutral({min(better, 1.0):.1g}) it is not"


def _body(form: NodeForm) -> list[str]:
    return text.statements(text.conv("s", "X", "W"), "y = Tanh (s)", text.affine("y", form))


@register_operator("kerv-sigmoid")
@dataclass(frozen=True)
class KervSigmoid(OperatorConfig):
    """Sigmoid kervolution as a rule's target: ``kerv-sigmoid``."""

    summary: ClassVar[str] = "hyperbolic tangent of the convolution"
    formula: ClassVar[str] = "tanh(wᵀx)"
    source: ClassVar[str] = "Wang et al. 2019, §4.1"
    starts: ClassVar[dict[str, str]] = {"neutral": "approximate", "copy": "none", "random": "none"}
    default_eps: ClassVar[float] = 2.0**-10
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "SigmoidKervolution2d", "kerv_sigmoid", ("input", "weight", "bias", "gain"), ("centered",), text.traits, _body
    )

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        layer = SigmoidKervolution2d.like(conv, centered=start.name == "neutral")
        return layer.begin(start, self.default_eps, absorb=absorb)
