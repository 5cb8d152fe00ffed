"""Sigmoid kervolution: tanh(wᵀx), Wang et al. 2019, §4.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.geometry import Site
from convsurgery.operators.base import Built, Start, register_operator
from convsurgery.operators.kervolution import _onnx as text
from convsurgery.operators.kervolution._call import as_constant, define, define_dial, functional_call
from convsurgery.operators.kervolution._conv import Window, affine, inner, overwritable, per_channel, tanh
from convsurgery.operators.kervolution._curve import Saturating, convolved, curve, finished
from convsurgery.operators.kervolution._dialled import DialConfig, Dialled
from convsurgery.operators.kervolution._layer import SHARE, Kervolution2d, power_of_two, quantile
from convsurgery.operators.onnx import NodeForm, OnnxFunction
from convsurgery.operators.precision import result_dtype, widened

__all__ = ["KervSigmoid", "SigmoidDial2d", "SigmoidKervolution2d", "kerv_sigmoid", "kerv_sigmoid_dial"]

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
    fresh = overwritable(x, weight, bias, gain, scale)
    s = inner(x, weight, Window(stride, padding, dilation, groups), scale)
    return affine(tanh(s, fresh), gain, bias, fresh).to(result_dtype(x))


define("kerv_sigmoid", "", "", _op)


def _dial(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    epsilon: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    fresh = overwritable(x, weight, bias, gain, epsilon)
    given = convolved(x, weight, bias, Window(stride, padding, dilation, groups))
    return finished(curve(Saturating, given.s, epsilon, fresh), given, epsilon, gain, bias, fresh)


define_dial("kerv_sigmoid_dial", "", "", _dial)


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


def kerv_sigmoid_dial(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    eps: float | Tensor,
    gain: Tensor | None = None,
) -> Tensor:
    """The sigmoid kernel dialled from the convolution: ``tanh(ε wᵀx) / ε + bias``.

    For ε = 0 it is wᵀx + bias, bit for bit what ``F.conv2d`` gives; for ε = 1 :func:`kerv_sigmoid`. Its derivative by ε
    is 0 at 0, where only that by ε² is not. Shapes, options and errors as
    :func:`~convsurgery.functional.kerv_poly_dial`.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> torch.allclose(CF.kerv_sigmoid_dial(x, w, eps=1.0), torch.nn.functional.conv2d(x, w).tanh())
        True
    """
    return functional_call(
        torch.ops.convsurgery.kerv_sigmoid_dial,
        (input, weight, bias, gain, as_constant(eps, weight)),
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
        s = self._responses(input)
        return _saturated(s, s.new_ones(()) if self.scale is None else self.scale)

    def _responses(self, input: Tensor) -> Tensor:
        window = (self.stride, (0, 0), self.dilation, self.groups)
        return F.conv2d(self.padded(input), widened(self.weight.detach()), None, *window)


class SigmoidDial2d(Dialled, SigmoidKervolution2d):
    """Layer form of :func:`kerv_sigmoid_dial`; options as :class:`torch.nn.Conv2d`."""

    def saturation(self, input: Tensor) -> str | None:
        assert self.eps is not None
        return _saturated(self._responses(input), self.eps.detach())


def _saturated(s: Tensor, factor: Tensor) -> str | None:
    """What to say where the tanh of ``factor · s`` hardly answers any more."""
    share = float(((s * per_channel(factor.to(s.dtype))).abs() > _SATURATED).float().mean())
    if share < SHARE:
        return None
    better = power_of_two(0.5 / max(quantile(s.abs(), 0.99), 1e-30))
    return f"saturated: {share:.0%} of tanh beyond ±0.98; by neutral({min(better, 1.0):.1g}) it is not"


def _body(form: NodeForm) -> list[str]:
    return text.statements(text.conv("s", "X", "W"), "y = Tanh (s)", text.affine("y", form))


def _dial_body(form: NodeForm) -> list[str]:
    # s · tanh(z) / z with z = εs
    lines = [text.by_channel("z", "s", "eps", "nils"), *text.tanh_ratio("slope", "z")]
    return text.dialled(lines, "f = Mul (s, slope)")


@register_operator("kerv-sigmoid")
@dataclass(frozen=True)
class KervSigmoid(DialConfig):
    """Sigmoid kervolution as a rule's target: ``kerv-sigmoid``."""

    summary: ClassVar[str] = "hyperbolic tangent of the convolution"
    formula: ClassVar[str] = "tanh(wᵀx)"
    source: ClassVar[str] = "Wang et al. 2019, §4.1"
    #: of the start that scales the filters
    default_eps: ClassVar[float] = 2.0**-10
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "SigmoidKervolution2d", "kerv_sigmoid", ("input", "weight", "bias", "gain"), ("centered",), text.traits, _body
    )
    more_onnx: ClassVar[tuple[OnnxFunction, ...]] = (
        OnnxFunction(
            "SigmoidDial2d",
            "kerv_sigmoid_dial",
            ("input", "weight", "bias", "gain", "epsilon"),
            (),
            text.no_overload,
            _dial_body,
        ),
    )

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        if start.name == "neutral" and not start.scaled:
            return SigmoidDial2d.like(conv).begin(start)
        layer = SigmoidKervolution2d.like(conv, centered=start.name == "neutral")
        return layer.begin(start, self.default_eps, absorb=absorb)
