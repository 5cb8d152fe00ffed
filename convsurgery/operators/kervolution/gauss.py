"""Gaussian kervolution: exp(−γ‖x − w‖²), Wang et al. 2019, eq. 11."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convsurgery.errors import ArgumentError
from convsurgery.geometry import Cost, Site
from convsurgery.operators.base import Built, Start, option, register_operator
from convsurgery.operators.kervolution import _onnx as text
from convsurgery.operators.kervolution._call import as_constant, define, define_dial, functional_call
from convsurgery.operators.kervolution._conv import (
    Window,
    add_by_group,
    affine,
    exact_inner,
    inner,
    overwritable,
    per_channel,
    squared_norm,
    window_squares,
)
from convsurgery.operators.kervolution._curve import Exponential, convolved, curve, finished, with_squares
from convsurgery.operators.kervolution._dialled import DialConfig, Dialled
from convsurgery.operators.kervolution._layer import (
    SHARE,
    Kervolution2d,
    distance_cost,
    learnable_cost,
    power_of_two,
    quantile,
)
from convsurgery.operators.onnx import NodeForm, OnnxFunction
from convsurgery.operators.precision import result_dtype, widened

__all__ = ["GaussDial2d", "GaussKervolution2d", "KervGauss", "kerv_gauss", "kerv_gauss_dial"]

#: the kernel's exponent at which its response is below a thousandth
_SATURATED = 7.0


def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
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
    fresh = overwritable(x, weight, bias, gamma, gain, scale)
    # −γ‖x − w‖² = 2γ wᵀx − γ‖w‖² − γ‖x‖². Centred, the filter's term is factored out:
    # e^(A + B) − e^B = e^B · expm1(A).
    factor = 2 * gamma if scale is None else 2 * gamma * scale
    # √γ goes to the scale before it is squared: alone, the square of a neutral scale may overflow.
    root = gamma.sqrt() if scale is None else gamma.sqrt() * scale
    height = -squared_norm(weight) * root.square()
    cross = inner(x, weight, window, factor) if centered else exact_inner(x, weight, window, factor, add=height)
    exponent = add_by_group(cross, -gamma.to(cross.dtype), window_squares(x, weight, window), fresh)
    if centered:
        y = exponent.expm1_() if fresh else exponent.expm1()
        peak = height.exp()
        return affine(y, peak if gain is None else peak * gain, bias, fresh).to(dtype)
    # A squared distance is never negative, also after rounding.
    y = exponent.clamp_max_(0).exp_() if fresh else exponent.clamp_max(0).exp()
    return affine(y, gain, bias, fresh).to(dtype)


define("kerv_gauss", "Tensor gamma", "", _op)


def _dial(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    epsilon: Tensor,
    kappa: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    window = Window(stride, padding, dilation, groups)
    fresh = overwritable(x, weight, bias, gain, epsilon, kappa)
    given = convolved(x, weight, bias, window)
    u = with_squares(given.s, x, weight, window, -kappa * epsilon)
    return finished(curve(Exponential, u, epsilon, fresh, inplace=True), given, epsilon, gain, bias, fresh)


define_dial("kerv_gauss_dial", "Tensor kappa", "", _dial)


def kerv_gauss(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    gamma: float | Tensor,
    centered: bool = False,
    gain: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Gaussian kervolution, ``exp(−gamma · ‖x − w‖²) + bias`` for every window.

    Wang et al., *Kervolutional Neural Networks* (2019), eq. 11; gradients eq. 13a and 13b. The distance is expanded to
    ``‖x‖² + ‖w‖² − 2wᵀx``: one convolution, and one with a single channel. Shapes, options and constants as
    :func:`~convsurgery.functional.kerv_poly`; ``centered`` subtracts ``exp(−gamma · ‖w‖²)`` by way of ``expm1``.

    Args:
        gamma: γ > 0, a number or a tensor of shape () or (C_out,).

    Raises:
        ValueError: for a number gamma that is not above 0.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> w = torch.randn(4, 3, 3, 3)
        >>> own = CF.kerv_gauss(w, w, gamma=0.1).flatten(1).diagonal()  # the distance of a filter to itself is 0
        >>> torch.allclose(own, torch.ones(4))
        True
    """
    if isinstance(gamma, int | float) and not gamma > 0:
        raise ValueError(f"gamma must be above 0, not {gamma}")
    return functional_call(
        torch.ops.convsurgery.kerv_gauss,
        (input, weight, bias, as_constant(gamma, weight), gain, scale, centered),
        (stride, padding, dilation, groups),
    )


def kerv_gauss_dial(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    eps: float | Tensor,
    kappa: float | Tensor,
    gain: Tensor | None = None,
) -> Tensor:
    """The Gaussian kernel dialled from the convolution: ``(exp(εu) − 1) / ε + bias`` with u = wᵀx − κε‖x‖².

    For ε = 0 it is wᵀx + bias, bit for bit what ``F.conv2d`` gives. Else, with γ = κε², w' = w / (2κε) and
    A = exp(−γ‖w'‖²), the kernel exp(−γ‖x − w'‖²) of :func:`kerv_gauss` is A (1 + ε · response). Shapes, options and
    errors as :func:`~convsurgery.functional.kerv_poly_dial`.

    Args:
        kappa: κ > 0, a number or a tensor of shape () or (C_out,); from ‖w‖² of the largest filter on, no response is
            above e^¼ times that at its peak.

    Raises:
        ValueError: for a number kappa that is not above 0.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> torch.equal(CF.kerv_gauss_dial(x, w, eps=0.0, kappa=32.0), torch.nn.functional.conv2d(x, w))
        True
    """
    if isinstance(kappa, int | float) and not kappa > 0:
        raise ValueError(f"kappa must be above 0, not {kappa}")
    return functional_call(
        torch.ops.convsurgery.kerv_gauss_dial,
        (input, weight, bias, gain, as_constant(eps, weight), as_constant(kappa, weight)),
        (stride, padding, dilation, groups),
    )


class GaussKervolution2d(Kervolution2d):
    """Layer form of :func:`kerv_gauss`; options as :class:`torch.nn.Conv2d`, and the kernel's.

    ``gamma`` is 1 over the number of values under the window when not given: for inputs and filters of unit variance
    the exponent is then of order 1. ``learnable`` trains it: ``True`` one for the layer, ``"channel"`` one for each
    output channel.
    """

    op_name = "kerv_gauss"
    hyper_name = "gamma"
    dial = {"scale": -1, "hyper": 2, "gain": -1}

    def __init__(self, *args: Any, gamma: float | None = None, learnable: bool | str = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = KervGauss(gamma=gamma, learnable=learnable)
        self.set_hyper(self.constant(config.gamma or 1 / self.geometry.patch), learnable)

    def neutral(self, eps: float) -> Tensor:
        # γ = κε² and filters w/(2κε), κ the largest ‖w_o‖² (here up to the next power of two, so that scaling the
        # filters is exact): exp(−γ‖x − w'‖²) = e^(−‖w‖²/4κ) · exp(εwᵀx − κε²‖x‖²).
        norms = self.weight.detach().double().square().sum((1, 2, 3))
        kappa = _kappa(self.weight)
        self.scale = self.constant(1 / (2 * kappa * eps))
        self.change_hyper(self.constant(kappa * eps**2))
        return (norms / (4 * kappa)).exp() / eps

    def saturation(self, input: Tensor) -> str | None:
        x, w = self.padded(input), widened(self.weight.detach())
        window = Window([*self.stride], [0, 0], [*self.dilation], self.groups)
        scale = w.new_ones(()) if self.scale is None else self.scale
        squares = add_by_group(inner(x, w, window, scale * -2), None, window_squares(x, w, window), False)
        if not self.centered:
            squares = squares + per_channel(squared_norm(w) * scale.square())
        gamma = self.hyper().detach()
        return _saturated(squares * per_channel(gamma), self.eps, gamma)


class GaussDial2d(Dialled, GaussKervolution2d):
    """Layer form of :func:`kerv_gauss_dial`, of which :class:`GaussKervolution2d` is the undialled kernel.

    ``kappa`` is the largest ‖w_o‖² up to the next power of two when not given. ``learnable`` trains γ as there:
    ``log_gamma`` is the logarithm of γ over κε².
    """

    hyper_name = "kappa"
    log_name = "log_gamma"

    def __init__(
        self,
        *args: Any,
        eps: float = 0.0,
        kappa: float | None = None,
        learnable: bool | str = False,
        **kwargs: Any,
    ) -> None:
        Kervolution2d.__init__(self, *args, **kwargs)
        if kappa is not None and not kappa > 0:
            raise ArgumentError("kappa", f"kappa wants a number > 0, not {kappa}")
        self.eps = self.constant(eps)
        # Without weights the caller sets it.
        self.set_hyper(self.constant(kappa or (1.0 if self.weight.is_meta else _kappa(self.weight))), learnable)

    def dial_constants(self) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        eps, _, gain = super().dial_constants()
        kappa, change = self._buffers["kappa"], self.change()
        assert kappa is not None
        if change is None:
            return eps, (kappa,), gain
        # γ times g, the filters staying, is ε times g and κ over g; and the response is over the ε of the start.
        return eps * change, (kappa / change,), self.times(change)

    def saturation(self, input: Tensor) -> str | None:
        eps, (kappa,), _ = self.dial_constants()
        x, w = self.padded(input), widened(self.weight.detach())
        window = Window([*self.stride], [0, 0], [*self.dilation], self.groups)
        u = with_squares(inner(x, w, window, None), x, w, window, -kappa.detach() * eps.detach())
        return _saturated(u * per_channel(eps.detach().to(u.dtype)), self.eps, kappa)


def _saturated(exponent: Tensor, eps: Tensor | None, gamma: Tensor) -> str | None:
    """What to say where the Gaussian of these exponents hardly answers any more."""
    exponent = exponent.abs()
    share = float((exponent > _SATURATED).float().mean())
    if share < SHARE:
        return None
    told = f"saturated: {share:.0%} of responses are off the middle by e^{_SATURATED:g} and more"
    if eps is not None:
        better = power_of_two(0.5 * float(eps.detach().amax()) / max(quantile(exponent, 0.99), 1e-30))
        return f"{told}; by neutral({better:.1g}) they are not"
    better = float(gamma.mean()) / max(quantile(exponent, 0.5), 1e-30)
    return f"{told}; gamma={better:.2g} suits these inputs"


def _kappa(weight: Tensor) -> float:
    """The largest ‖w_o‖², up to the next power of two, so that scaling by it is exact."""
    largest = float(weight.detach().double().square().sum((1, 2, 3)).max())
    return 2.0 ** math.ceil(math.log2(max(largest, 2.0**-40)))


def _body(form: NodeForm) -> list[str]:
    lines = [text.number("two", 2.0), "minus_gamma = Neg (gamma)", "two_gamma = Mul (two, gamma)"]
    # The factor 2γ goes into the filters, where a runtime folds it.
    lines += ["filter_shape = Constant <value_ints = [-1, 1, 1, 1]> ()", "factor = Reshape (two_gamma, filter_shape)"]
    lines += ["w_scaled = Mul (W, factor)", text.conv("cross", "X", "w_scaled")]
    lines += [*text.squared_norms(), text.channel("height_factor", "minus_gamma"), "height = Mul (height_factor, ww)"]
    lines += text.window_squares(form)
    if form.centered:
        lines += text.add_window_map("exponent", "cross", "minus_gamma", form)
        # expm1(a) = 2 tanh(a/2) / (1 − tanh(a/2)): ONNX has no expm1. a is bounded above by γ‖w‖².
        lines += [text.number("half", 0.5), text.number("unit", 1.0), "a_half = Mul (exponent, half)"]
        lines += ["th = Tanh (a_half)", "below = Sub (unit, th)", "ratio = Div (th, below)"]
        lines += ["peak = Exp (height)", "peak_two = Mul (peak, two)", "y = Mul (ratio, peak_two)"]
    else:
        lines.append("s = Add (cross, height)")
        lines += text.add_window_map("exponent", "s", "minus_gamma", form)
        lines += [text.number("nil", 0.0), "bounded = Min (exponent, nil)", "y = Exp (bounded)"]
    return text.statements(lines, text.affine("y", form))


def _dial_body(form: NodeForm) -> list[str]:
    # u · (exp(2h) − 1) / 2h with u = s − κε‖x‖², h = εu/2. ONNX has no expm1: of r = tanh(h) / h it is r / (1 − r·h).
    lines = ["kappas = Expand (kappa, count)", "kappa_eps = Mul (kappas, eps)", "pull = Neg (kappa_eps)"]
    lines += text.add_squares("u", "pull")
    lines += [text.number("half", 0.5), "half_eps = Mul (eps, half)", text.by_channel("h", "u", "half_eps", "nils")]
    lines += [*text.tanh_ratio("r", "h"), "th = Mul (r, h)", "below = Sub (one, th)", "slope = Div (r, below)"]
    return text.dialled(lines, "f = Mul (u, slope)")


@register_operator("kerv-gauss")
@dataclass(frozen=True)
class KervGauss(DialConfig):
    """Gaussian kervolution as a rule's target: ``kerv-gauss(gamma=0.1, learnable=true)``.

    Without ``gamma`` the start chooses it. The neutral start has to, so giving ``gamma`` means starting by copy.
    """

    summary: ClassVar[str] = "Gaussian of the distance between window and filter"
    formula: ClassVar[str] = "exp(−γ‖x − w‖²)"
    source: ClassVar[str] = "Wang et al. 2019, eq. 11"
    #: of the start that scales the filters
    default_eps: ClassVar[float] = 2.0**-24
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "GaussKervolution2d",
        "kerv_gauss",
        ("input", "weight", "bias", "gamma", "gain"),
        ("centered",),
        text.traits,
        _body,
    )
    more_onnx: ClassVar[tuple[OnnxFunction, ...]] = (
        OnnxFunction(
            "GaussDial2d",
            "kerv_gauss_dial",
            ("input", "weight", "bias", "gain", "epsilon", "kappa"),
            (),
            text.no_overload,
            _dial_body,
        ),
    )

    gamma: float | None = option(
        None, "width γ > 0; chosen by the start when absent", kind=float, above=0, choices=(None,)
    )
    learnable: bool | str = option(
        False, "train γ: one for the layer, or one per channel", kind=bool, choices=("channel",)
    )

    def refuses_start(self, start: str, site: Site | None = None) -> str | None:
        if start == "neutral" and self.gamma is not None:
            return "the neutral start chooses gamma itself; leave gamma out"
        return None

    def cost(self, site: Site) -> Cost:
        return learnable_cost(site, self.learnable, distance_cost(site))

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        if start.name == "neutral" and not start.scaled:
            dialled = GaussDial2d.like(conv)
            dialled.set_hyper(dialled.constant(_kappa(conv.weight)), self.learnable)
            return dialled.begin(start)
        layer = GaussKervolution2d.like(conv, centered=start.name == "neutral")
        layer.set_hyper(layer.constant(self.gamma or 1 / layer.geometry.patch), self.learnable)
        return layer.begin(start, self.default_eps, absorb=absorb)
