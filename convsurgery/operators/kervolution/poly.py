"""Polynomial kervolution: (wᵀx + c)^d, Wang et al. 2019, eq. 10."""

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
from convsurgery.operators.kervolution._conv import Window, affine, apply, inner, overwritable
from convsurgery.operators.kervolution._curve import convolved, finished
from convsurgery.operators.kervolution._dialled import DialConfig, Dialled
from convsurgery.operators.kervolution._layer import Kervolution2d, learnable_cost
from convsurgery.operators.kervolution._powers import (
    Polynomial,
    Power,
    coefficients,
    dialled_coefficients,
    horner,
    power,
)
from convsurgery.operators.onnx import NodeForm, OnnxFunction
from convsurgery.operators.precision import result_dtype

__all__ = ["KervPoly", "PolyDial2d", "PolyKervolution2d", "kerv_poly", "kerv_poly_dial"]

_NO_LINEAR_TERM = "without a balance the polynomial has no linear term; give balance > 0"


def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    balance: Tensor,
    gain: Tensor | None,
    scale: Tensor | None,
    degree: int,
    centered: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    dtype = result_dtype(x)
    window = Window(stride, padding, dilation, groups)
    fresh = overwritable(x, weight, bias, balance, gain, scale)
    if centered:
        s = inner(x, weight, window, scale)
        k = coefficients(balance.to(s.dtype), gain, bias, degree).to(s.dtype)
        y = horner(s, k, bias is not None) if fresh else apply(Polynomial, s, k)
    else:
        t = inner(x, weight, window, scale, add=balance)
        y = power(t, degree, inplace=True) if fresh else apply(Power, t, degree)
        y = affine(y, gain, bias, fresh)
    return y.to(dtype)


define("kerv_poly", "Tensor balance", "int degree", _op)


def _dial(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    epsilon: Tensor,
    balance: Tensor,
    degree: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    fresh = overwritable(x, weight, bias, gain, epsilon, balance)
    given = convolved(x, weight, bias, Window(stride, padding, dilation, groups))
    # The coefficients have ε in them, so that no power of s is formed where it is 0.
    k = dialled_coefficients(epsilon.to(given.s.dtype), balance.to(given.s.dtype), degree)
    y = horner(given.s, k, biased=False) if fresh else apply(Polynomial, given.s, k)
    return finished(y, given, epsilon, gain, bias, fresh)


define_dial("kerv_poly_dial", "Tensor balance", "int degree", _dial)


def kerv_poly(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    degree: int = 3,
    balance: float | Tensor = 1.0,
    centered: bool = False,
    gain: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Polynomial kervolution, ``(wᵀx + balance) ** degree + bias`` for every window.

    Wang et al., *Kervolutional Neural Networks* (2019), eq. 10. Costs one convolution and a few pointwise passes; no
    patch matrix is made.

    Args:
        input: (N, C_in, H, W).
        weight: (C_out, C_in / groups, kh, kw).
        bias: (C_out,), added outside the kernel.
        stride, padding, dilation, groups: as for :func:`torch.nn.functional.conv2d`, in pixels; padding with zeros.
        degree: d >= 1.
        balance: c >= 0, a number or a tensor of shape () or (C_out,).
        centered: subtract the response to an empty window, c^d, without cancellation.
        gain: factor on the kernel's response, () or (C_out,).
        scale: factor on the filters, () or (C_out,).

    Returns:
        (N, C_out, H_out, W_out), in the dtype the convolution would have.

    Raises:
        ValueError: for a degree below 1, or a number below 0 as balance.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> torch.equal(CF.kerv_poly(x, w, degree=1, balance=0.0), torch.nn.functional.conv2d(x, w))
        True
    """
    if degree < 1:
        raise ValueError(f"degree must be at least 1, not {degree}")
    if isinstance(balance, int | float) and not balance >= 0:
        raise ValueError(f"balance must not be below 0, not {balance}")
    return functional_call(
        torch.ops.convsurgery.kerv_poly,
        (input, weight, bias, as_constant(balance, weight), gain, scale, degree, centered),
        (stride, padding, dilation, groups),
    )


def kerv_poly_dial(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    eps: float | Tensor,
    degree: int = 3,
    balance: float | Tensor = 1.0,
    gain: Tensor | None = None,
) -> Tensor:
    """The polynomial kernel dialled from the convolution: ``((εs + c)ᵈ − cᵈ) / (d cᵈ⁻¹ ε) + bias`` with s = wᵀx.

    For ε = 0 it is s + bias, bit for bit what ``F.conv2d`` gives; for ε = 1 the kernel of :func:`kerv_poly`, less its
    response to an empty window and over d cᵈ⁻¹: Σⱼ C(d, j) (ε/c)ʲ⁻¹ sʲ / d, j from 1 to d.

    Args:
        input, weight, bias, stride, padding, dilation, groups, degree, gain: as for :func:`kerv_poly`.
        eps: ε, a number or a tensor of shape () or (C_out,); it has a derivative at 0 too.
        balance: c > 0, a number or a tensor of shape () or (C_out,).

    Returns:
        (N, C_out, H_out, W_out), in the dtype the convolution would have.

    Raises:
        ValueError: for a degree below 1, or a number as balance that is not above 0.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> x, w, b = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
        >>> torch.equal(CF.kerv_poly_dial(x, w, b, eps=0.0), torch.nn.functional.conv2d(x, w, b))
        True
    """
    if degree < 1:
        raise ValueError(f"degree must be at least 1, not {degree}")
    if isinstance(balance, int | float) and not balance > 0:
        raise ValueError(f"balance must be above 0, not {balance}: without it there is no linear term")
    return functional_call(
        torch.ops.convsurgery.kerv_poly_dial,
        (input, weight, bias, gain, as_constant(eps, weight), as_constant(balance, weight), degree),
        (stride, padding, dilation, groups),
    )


class PolyKervolution2d(Kervolution2d):
    """Layer form of :func:`kerv_poly`; options as :class:`torch.nn.Conv2d`, and the kernel's.

    ``learnable`` trains the balance: ``True`` one for the layer, ``"channel"`` one for each output channel.

    Example:
        >>> import torch
        >>> PolyKervolution2d(3, 8, 3, padding="same", degree=2)(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 8, 16, 16])
    """

    op_name = "kerv_poly"
    hyper_name = "balance"
    dial = {"scale": 1, "gain": -1}

    def __init__(
        self, *args: Any, degree: int = 3, balance: float = 1.0, learnable: bool | str = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        config = KervPoly(degree=degree, balance=balance, learnable=learnable)
        self.degree = config.degree
        self.set_hyper(self.constant(balance), learnable)

    def options(self) -> dict[str, Any]:
        return {"degree": self.degree}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, degree={self.degree}"

    def neutral(self, eps: float) -> Tensor:
        self.scale = self.constant(eps)
        balance = self.hyper().detach().double()
        return 1 / (self.degree * balance ** (self.degree - 1) * eps)


class PolyDial2d(Dialled, PolyKervolution2d):
    """Layer form of :func:`kerv_poly_dial`, of which :class:`PolyKervolution2d` is the undialled kernel.

    ``learnable`` trains the balance c, as there: ``log_balance`` is the logarithm of c over what it began with.

    Example:
        >>> import torch
        >>> PolyDial2d(3, 8, 3, padding="same", degree=2, eps=0.1)(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 8, 16, 16])
    """

    log_name = "log_balance"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.degree > 1 and not kwargs.get("balance", 1.0) > 0:
            raise ArgumentError("balance", _NO_LINEAR_TERM)

    def dial_constants(self) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        eps, _, gain = super().dial_constants()
        balance, change, larger = self._buffers["balance"], self.change(), self.change(self.degree - 1)
        assert balance is not None
        if change is None or larger is None:
            return eps, (balance,), gain
        # The d·c^(d−1) that the response is over stays that of the start.
        return eps, (balance * change,), self.times(larger)


def _overload(form: NodeForm) -> str:
    return text.traits(form, f"d{form.attributes['degree']}")


def _body(form: NodeForm) -> list[str]:
    degree = form.attributes["degree"]
    lines = [text.conv("s", "X", "W")]
    lines += text.expanded("c", "balance") if not form.centered else [text.channel("c", "balance")]
    if not form.centered:
        power, result = text.powers("t", degree)
        return text.statements(lines, "t = Add (s, c)", power, text.affine(result, form))
    # (s + c)^d − c^d by Horner's rule; its leading coefficient is 1, the others are constants that a runtime folds.
    power_of_c, result = "c", "s"
    for j in range(degree - 1, 0, -1):
        lines += [text.number(f"n{j}", float(math.comb(degree, j))), f"k{j} = Mul (n{j}, {power_of_c})"]
        lines += [f"z{j} = Add ({result}, k{j})", f"y{j} = Mul (z{j}, s)"]
        result = f"y{j}"
        if j > 1:
            lines.append(f"c{j} = Mul ({power_of_c}, c)")
            power_of_c = f"c{j}"
    return text.statements(lines, text.affine(result, form))


def _dial_body(form: NodeForm) -> list[str]:
    # s·(1 + a₂(ε/c)s·(1 + a₃(ε/c)s·(1 + …))) with aⱼ = (d − j + 1) / j: no power of s is formed without its ε.
    degree = form.attributes["degree"]
    lines = ["balances = Expand (balance, count)", "ratio = Div (eps, balances)"]
    result = ""
    for j in range(degree, 1, -1):
        lines += [text.number(f"a{j}", (degree - j + 1) / j), f"factor{j} = Mul (ratio, a{j})"]
        if result:
            lines.append(f"m{j} = Mul (s, {result})")
        lines.append(text.by_channel(f"r{j}", f"m{j}" if result else "s", f"factor{j}", "ones"))
        result = f"r{j}"
    return text.dialled(lines, f"f = Mul (s, {result})" if result else "f = Identity (s)")


@register_operator("kerv-poly")
@dataclass(frozen=True)
class KervPoly(DialConfig):
    """Polynomial kervolution as a rule's target: ``kerv-poly(degree=3, balance=1.0, learnable=false)``."""

    summary: ClassVar[str] = "polynomial kernel of the window and the filter"
    formula: ClassVar[str] = "(wᵀx + c)^d"
    source: ClassVar[str] = "Wang et al. 2019, eq. 10"
    #: of the start that scales the filters
    default_eps: ClassVar[float] = 2.0**-18
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "PolyKervolution2d",
        "kerv_poly",
        ("input", "weight", "bias", "balance", "gain"),
        ("degree", "centered"),
        _overload,
        _body,
    )
    more_onnx: ClassVar[tuple[OnnxFunction, ...]] = (
        OnnxFunction(
            "PolyDial2d",
            "kerv_poly_dial",
            ("input", "weight", "bias", "gain", "epsilon", "balance"),
            ("degree",),
            text.no_overload,
            _dial_body,
            named_by=("degree",),
        ),
    )

    degree: int = option(3, "power d of the polynomial", kind=int, least=1, most=64)
    balance: float = option(1.0, "weight c of the lower orders", kind=float, least=0)
    learnable: bool | str = option(
        False, "train the balance: one for the layer, or one per channel", kind=bool, choices=("channel",)
    )

    def validate(self) -> None:
        if self.learnable and self.balance == 0:
            raise ArgumentError("balance", "a learnable balance must start above 0", "try balance=1")

    def refuses_start(self, start: str, site: Site | None = None) -> str | None:
        if start == "neutral" and self.balance == 0 and self.degree > 1:
            return _NO_LINEAR_TERM
        return None

    def cost(self, site: Site) -> Cost:
        return learnable_cost(site, self.learnable, site.cost)

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        layer: PolyKervolution2d
        if start.name == "neutral" and not start.scaled:
            layer = PolyDial2d.like(conv, degree=self.degree)
        else:
            layer = PolyKervolution2d.like(conv, centered=start.name == "neutral", degree=self.degree)
        layer.set_hyper(layer.constant(self.balance), self.learnable)
        return layer.begin(start, self.default_eps, absorb=absorb)
