"""Polynomial kervolution: (wᵀx + c)^d, Wang et al. 2019, eq. 10."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convsurgery.errors import ArgumentError
from convsurgery.geometry import Cost, Site
from convsurgery.operators.base import Built, OperatorConfig, Start, option, register_operator
from convsurgery.operators.kervolution import _onnx as text
from convsurgery.operators.kervolution._call import as_constant, define, functional_call
from convsurgery.operators.kervolution._conv import Window, affine, apply, inner, per_channel
from convsurgery.operators.kervolution._layer import Kervolution2d, learnable_cost
from convsurgery.operators.onnx import NodeForm, OnnxFunction
from convsurgery.operators.precision import no_grad_needed, result_dtype

__all__ = ["KervPoly", "PolyKervolution2d", "kerv_poly"]


class _Power(torch.autograd.Function):
    """t^d by repeated multiplication; keeps t alone for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, degree: int) -> Tensor:
        return _power(t, degree, inplace=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.degree = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (t,) = ctx.saved_tensors
        degree = ctx.degree
        if degree == 1:
            return grad, None
        if torch.is_grad_enabled():  # a double backward is being recorded
            return grad * apply(_Power, t, degree - 1) * degree, None
        return _power(t, degree - 1, inplace=False).mul_(grad).mul_(degree), None


def _power(t: Tensor, degree: int, *, inplace: bool) -> Tensor:
    """t^degree with about log2(degree) squarings; ``inplace`` allows overwriting t."""
    if degree == 1:
        return t if inplace else t.clone()
    result: Tensor | None = None
    square, owned = t, inplace
    while degree > 1:
        if degree & 1:
            result = square if result is None else result * square
        # A square that the result still holds must live on.
        square = square.mul_(square) if owned and result is not square else square * square
        owned = True
        degree >>= 1
    return square if result is None else square.mul_(result)


class _Polynomial(torch.autograd.Function):
    """Σ_j k_j s^j by Horner's rule, j = 0 … d; keeps s alone for the backward pass.

    ``k`` has the coefficients in rows, (d + 1, C, 1, 1), or (d + 1,) where all are alike for all channels: scalars
    cost less than a broadcast.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, k: Tensor) -> Tensor:
        return _horner(s, k, biased=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        s, k = ctx.saved_tensors
        grad_s = grad_k = None
        if ctx.needs_input_grad[0]:
            slopes = k[1:] * torch.arange(1, k.shape[0], device=k.device, dtype=k.dtype).view(-1, *[1] * (k.dim() - 1))
            if torch.is_grad_enabled() and k.shape[0] > 2:  # a double backward is being recorded
                grad_s = grad * apply(_Polynomial, s, slopes)
            else:
                grad_s = _horner(s, slopes, biased=True).mul_(grad) if k.shape[0] > 2 else grad * slopes[0]
        if ctx.needs_input_grad[1]:
            rows, term = [], grad
            for _ in range(k.shape[0]):
                rows.append(term.sum_to_size(k.shape[1:]))
                term = term * s
            grad_k = torch.stack(rows)
        return grad_s, grad_k


def _coefficients(balance: Tensor, gain: Tensor | None, bias: Tensor | None, degree: int) -> Tensor:
    """Rows k_0 … k_d of g·((s + c)^d − c^d) + b as a polynomial in s."""
    c = per_channel(balance)
    factors = [math.comb(degree, j) * c ** (degree - j) for j in range(1, degree + 1)]
    if gain is not None:
        factors = [per_channel(gain) * factor for factor in factors]
    constant = c.new_zeros(()) if bias is None else per_channel(bias).to(c.dtype)
    return torch.stack(torch.broadcast_tensors(constant, *factors))


def _horner(s: Tensor, k: Tensor, biased: bool) -> Tensor:
    """Σ_j k_j s^j with one new tensor, the result; without ``biased``, k_0 is left out."""
    y = s * k[-1]
    for row in range(k.shape[0] - 2, 0, -1):
        y = y.add_(k[row]).mul_(s)
    return y.add_(k[0]) if biased else y


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
    fresh = no_grad_needed(x, weight, bias, balance, gain, scale)
    if centered:
        s = inner(x, weight, window, scale)
        k = _coefficients(balance.to(s.dtype), gain, bias, degree).to(s.dtype)
        y = _horner(s, k, bias is not None) if fresh else apply(_Polynomial, s, k)
    else:
        t = inner(x, weight, window, scale, add=balance)
        y = _power(t, degree, inplace=True) if fresh else apply(_Power, t, degree)
        y = affine(y, gain, bias, fresh)
    return y.to(dtype)


define("kerv_poly", "Tensor balance", "int degree", _op)


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


@register_operator("kerv-poly")
@dataclass(frozen=True)
class KervPoly(OperatorConfig):
    """Polynomial kervolution as a rule's target: ``kerv-poly(degree=3, balance=1.0, learnable=false)``."""

    summary: ClassVar[str] = "polynomial kernel of the window and the filter"
    formula: ClassVar[str] = "(wᵀx + c)^d"
    source: ClassVar[str] = "Wang et al. 2019, eq. 10"
    starts: ClassVar[dict[str, str]] = {"neutral": "approximate", "copy": "none", "random": "none"}
    default_eps: ClassVar[float] = 2.0**-18
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "PolyKervolution2d",
        "kerv_poly",
        ("input", "weight", "bias", "balance", "gain"),
        ("degree", "centered"),
        _overload,
        _body,
    )

    degree: int = option(3, "power d of the polynomial", kind=int, least=1)
    balance: float = option(1.0, "weight c of the lower orders", kind=float, least=0)
    learnable: bool | str = option(
        False, "train the balance: one for the layer, or one per channel", kind=bool, choices=("channel",)
    )

    def validate(self) -> None:
        if self.learnable and self.balance == 0:
            raise ArgumentError("balance", "a learnable balance must start above 0", "try balance=1")

    def refuses_start(self, start: str, site: Site | None = None) -> str | None:
        if start == "neutral" and self.balance == 0 and self.degree > 1:
            return "without a balance the polynomial has no linear term; give balance > 0"
        return None

    def cost(self, site: Site) -> Cost:
        return learnable_cost(site, self.learnable, site.cost)

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        layer = PolyKervolution2d.like(conv, centered=start.name == "neutral", degree=self.degree)
        layer.set_hyper(layer.constant(self.balance), self.learnable)
        return layer.begin(start, self.default_eps, absorb=absorb)
