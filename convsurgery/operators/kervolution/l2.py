"""Euclidean kervolution: ‖x − w‖₂, Wang et al. 2019, eq. 9b."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convsurgery.geometry import Cost, Site
from convsurgery.operators.base import Built, Start, register_operator
from convsurgery.operators.kervolution import _onnx as text
from convsurgery.operators.kervolution._call import as_constant, define, define_dial, functional_call
from convsurgery.operators.kervolution._conv import (
    TINY,
    Root,
    Window,
    add_by_group,
    affine,
    apply,
    exact_inner,
    halved_product,
    inner,
    overwritable,
    per_channel,
    reciprocal_or_zero,
    root,
    squared_norm,
    window_squares,
)
from convsurgery.operators.kervolution._curve import Rooted, convolved, curve, finished, norms, with_squares
from convsurgery.operators.kervolution._dialled import DialConfig, Dialled
from convsurgery.operators.kervolution._layer import Kervolution2d, distance_cost
from convsurgery.operators.onnx import NodeForm, OnnxFunction
from convsurgery.operators.precision import result_dtype

__all__ = ["KervL2", "L2Dial2d", "L2Kervolution2d", "kerv_l2", "kerv_l2_dial"]


class _CenteredRoot(torch.autograd.Function):
    """√(q + ww) − √ww = q / (√(q + ww) + √ww), which does not cancel; q = ‖x‖² − 2wᵀx, ww = ‖w‖².

    Keeps its result alone for the backward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def plain(q: Tensor, ww: Tensor) -> Tensor:
        return q / (Root.plain(q + ww) + Root.plain(ww)).clamp_min(TINY)

    @staticmethod
    def forward(q: Tensor, ww: Tensor) -> Tensor:
        # Both roots are 0 only for an empty filter over an empty window, where q is 0 too.
        below = (q + ww).clamp_min_(0).sqrt_().add_(ww.sqrt()).clamp_min_(TINY)
        return torch.div(q, below, out=below)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, ww = ctx.saved_tensors
        norm = apply(Root, ww)
        grad_q = halved_product(grad, reciprocal_or_zero(y + norm))
        at_rest = halved_product(grad.sum_to_size(ww.shape), reciprocal_or_zero(norm))
        return grad_q, grad_q.sum_to_size(ww.shape) - at_rest


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
    dtype = result_dtype(x)
    window = Window(stride, padding, dilation, groups)
    fresh = overwritable(x, weight, bias, gain, scale)
    ww = squared_norm(weight)
    factor = ww.new_full((), -2.0)
    if scale is not None:
        ww, factor = ww * scale.square(), scale * -2
    xx = window_squares(x, weight, window)
    if not centered:
        squares = add_by_group(exact_inner(x, weight, window, factor, add=ww), None, xx, fresh)
        return affine(root(squares, fresh), gain, bias, fresh).to(dtype)
    q = add_by_group(inner(x, weight, window, factor), None, xx, fresh)
    return affine(apply(_CenteredRoot, q, per_channel(ww)), gain, bias, fresh).to(dtype)


define("kerv_l2", "", "", _op)


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
    window = Window(stride, padding, dilation, groups)
    fresh = overwritable(x, weight, bias, gain, epsilon)
    given = convolved(x, weight, bias, window)
    length, inverse = norms(weight)
    m = with_squares(given.s, x, weight, window, epsilon * length / 2)
    return finished(curve(Rooted, m, epsilon * inverse, fresh, inplace=True), given, epsilon, gain, bias, fresh)


define_dial("kerv_l2_dial", "", "", _dial)


def kerv_l2(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    centered: bool = False,
    gain: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Euclidean kervolution, ``‖x − w‖₂ + bias`` (the root taken) for every window.

    Wang et al., *Kervolutional Neural Networks* (2019), eq. 9b. The distance is expanded to ``‖x‖² + ‖w‖² − 2wᵀx``: one
    convolution, and one with a single channel. Where a window equals a filter the gradient, infinite in truth, is 0.
    Shapes, options and constants as :func:`~convsurgery.functional.kerv_poly`; ``centered`` subtracts ``‖w‖``.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> w = torch.ones(2, 1, 2, 2)
        >>> CF.kerv_l2(torch.zeros(1, 1, 2, 2), w).flatten()  # √(1 + 1 + 1 + 1)
        tensor([2., 2.])
    """
    return functional_call(
        torch.ops.convsurgery.kerv_l2,
        (input, weight, bias, gain, scale, centered),
        (stride, padding, dilation, groups),
    )


def kerv_l2_dial(
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
    """The Euclidean kernel dialled from the convolution: ``(ε‖x − w'‖ − 1) ‖w‖ / ε + bias`` with w' = −w / (ε‖w‖).

    For ε = 0 it is wᵀx + bias, bit for bit what ``F.conv2d`` gives; for ε = 1 the distance of :func:`kerv_l2` to
    filters of length 1. Computed as m / (½ + √(¼ + εm / 2‖w‖)) with m = wᵀx + ε‖w‖‖x‖²/2, which does not cancel. A
    filter of zeros gives 0. Shapes, options and errors as :func:`~convsurgery.functional.kerv_poly_dial`.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> torch.equal(CF.kerv_l2_dial(x, w, eps=0.0), torch.nn.functional.conv2d(x, w))
        True
    """
    return functional_call(
        torch.ops.convsurgery.kerv_l2_dial,
        (input, weight, bias, gain, as_constant(eps, weight)),
        (stride, padding, dilation, groups),
    )


class L2Kervolution2d(Kervolution2d):
    """Layer form of :func:`kerv_l2`; options as :class:`torch.nn.Conv2d`."""

    op_name = "kerv_l2"
    dial = {"scale": -1}

    def neutral(self, eps: float) -> Tensor:
        # Filters −w/(ε‖w‖), at distance 1/ε: ‖x − w'‖ ≈ 1/ε + wᵀx/‖w‖. The norm is rounded up to a power of two in the
        # scale, so that scaling is exact, and kept in full in the gain. A dead filter is given a small norm: its
        # output stays near the 0 it was.
        norms = self.weight.detach().double().square().sum((1, 2, 3)).sqrt()
        norms = norms.clamp_min(max(1e-6 * float(norms.max()), 2.0**-40))
        self.scale = self.constant(-1 / (eps * norms.log2().ceil().exp2()))
        return norms


class L2Dial2d(Dialled, L2Kervolution2d):
    """Layer form of :func:`kerv_l2_dial`; options as :class:`torch.nn.Conv2d`."""


def _body(form: NodeForm) -> list[str]:
    lines = [text.number("minus_two", -2.0), "w_scaled = Mul (W, minus_two)", text.conv("cross", "X", "w_scaled")]
    lines += [*text.squared_norms(), *text.window_squares(form), text.number("nil", 0.0)]
    if form.centered:
        lines += text.add_window_map("q", "cross", "one", form)
        lines += ["sum = Add (q, ww)", "bounded = Max (sum, nil)", "distance = Sqrt (bounded)"]
        lines += ["norm = Sqrt (ww)", "total = Add (distance, norm)", text.number("tiny", TINY)]
        lines += ["below = Max (total, tiny)", "y = Div (q, below)"]
    else:
        lines.append("s = Add (cross, ww)")
        lines += text.add_window_map("sum", "s", "one", form)
        lines += ["bounded = Max (sum, nil)", "y = Sqrt (bounded)"]
    return text.statements(lines, text.affine("y", form))


def _dial_body(form: NodeForm) -> list[str]:
    # m / (½ + √(¼ + εm / 2‖w‖)), m = s + ε‖w‖‖x‖²/2; a filter of zeros has no direction and gives 0.
    lines = ["filter_axes = Constant <value_ints = [1, 2, 3]> ()", "filter_squares = Mul (W, W)"]
    lines += ["ww = ReduceSum <keepdims = 0> (filter_squares, filter_axes)", "norm = Sqrt (ww)"]
    lines += [text.number("half", 0.5), "half_eps = Mul (eps, half)", "pull = Mul (half_eps, norm)"]
    lines += text.add_squares("m", "pull")
    lines += ["alive = Greater (norm, nil)", "safe_norm = Where (alive, norm, one)", "bend = Div (half_eps, safe_norm)"]
    lines += [
        "bend_alive = Where (alive, bend, nil)",
        text.number("quarter", 0.25),
        "quarters = Expand (quarter, count)",
    ]
    lines += [text.by_channel("inside", "m", "bend_alive", "quarters"), "bounded = Max (inside, nil)"]
    lines += ["root = Sqrt (bounded)", "below = Add (root, half)"]
    return text.dialled(lines, "f = Div (m, below)")


@register_operator("kerv-l2")
@dataclass(frozen=True)
class KervL2(DialConfig):
    """Euclidean kervolution as a rule's target: ``kerv-l2``."""

    summary: ClassVar[str] = "Euclidean distance between window and filter"
    formula: ClassVar[str] = "‖x − w‖₂"
    source: ClassVar[str] = "Wang et al. 2019, eq. 9b"
    #: of the start that scales the filters
    default_eps: ClassVar[float] = 2.0**-23
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "L2Kervolution2d", "kerv_l2", ("input", "weight", "bias", "gain"), ("centered",), text.traits, _body
    )
    more_onnx: ClassVar[tuple[OnnxFunction, ...]] = (
        OnnxFunction(
            "L2Dial2d", "kerv_l2_dial", ("input", "weight", "bias", "gain", "epsilon"), (), text.no_overload, _dial_body
        ),
    )

    def cost(self, site: Site) -> Cost:
        return distance_cost(site)

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        if start.name == "neutral" and not start.scaled:
            return L2Dial2d.like(conv).begin(start)
        layer = L2Kervolution2d.like(conv, centered=start.name == "neutral")
        return layer.begin(start, self.default_eps, absorb=absorb)
