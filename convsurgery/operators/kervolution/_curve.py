"""Responses that are the convolution's own where ε is 0, bent the more the larger ε is.

Each is f(e·m)/e for a curve f with f(0) = 0 and f′(0) = 1, m being the convolution's response or that and a share of
‖x‖². Nothing in them is large or small where e is: no constant has to undo another, in half precision neither.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convsurgery.operators.kervolution._conv import (
    Root,
    Window,
    add_by_group,
    affine,
    apply,
    per_channel,
    reciprocal_or_zero,
    squared_norm,
    tanh,
    window_squares,
)
from convsurgery.operators.precision import widened

__all__ = [
    "Convolved",
    "Exponential",
    "Rooted",
    "Saturating",
    "convolved",
    "curve",
    "finished",
    "norms",
    "with_squares",
]

#: nearer to 0 than that ε is taken for 0: no rounding shows it, and 1/ε has to stay finite
_STILL = 2.0**-64

#: below it the derivatives by ε are taken from their series: in their closed form differences cancel
_NEAR = 0.2
#: tanh(z)/z in powers of z², (exp(z) − 1)/z in powers of z
_TANH = (1, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075, -929569 / 638512875)
_EXPM1 = tuple(1 / math.factorial(n + 1) for n in range(12))


class Convolved(NamedTuple):
    """What a convolution gives.

    Attributes:
        plain: its output, bias included, by the very call and in the very dtype of ``nn.Conv2d``.
        wide: the same in at least float32.
        s: wᵀx, without the bias, in at least float32.
    """

    plain: Tensor
    wide: Tensor
    s: Tensor


def convolved(x: Tensor, w: Tensor, bias: Tensor | None, window: Window) -> Convolved:
    # The bias has its gradient where it is added in the end.
    plain = F.conv2d(x, w, None if bias is None else bias.detach(), *window)
    wide = widened(plain)
    return Convolved(plain, wide, wide if bias is None else wide - per_channel(bias.detach().to(wide.dtype)))


def is_still(e: Tensor) -> Tensor:
    """Where ε is 0."""
    return e.abs() < _STILL


def with_squares(s: Tensor, x: Tensor, w: Tensor, window: Window, factor: Tensor) -> Tensor:
    """``s + factor · ‖x‖²``; for a factor of 0 it is s, whatever the size of x."""
    squares = window_squares(x, w, window)
    # 0 times a sum that has left the range would be NaN.
    return add_by_group(s, factor.to(s.dtype), squares.clamp_max(torch.finfo(squares.dtype).max), False)


def norms(w: Tensor) -> tuple[Tensor, Tensor]:
    """‖w_o‖, (C_out,), and 1/‖w_o‖, which is 0 for a filter of zeros."""
    lengths = apply(Root, squared_norm(w))
    return lengths, reciprocal_or_zero(lengths)


def finished(
    y: Tensor, given: Convolved, epsilon: Tensor, gain: Tensor | None, bias: Tensor | None, fresh: bool
) -> Tensor:
    """``gain · y + bias`` in the dtype of the convolution: its very output where ε is 0 and the gain, if any, 1."""
    still = is_still(epsilon)
    if gain is not None:
        y = _settled(y, given.s, per_channel(still), fresh)
        still = still & (gain == 1)
    y = affine(y, gain, bias, fresh)
    return _settled(y, given.wide, per_channel(still), fresh).to(given.plain.dtype)


def _settled(y: Tensor, kept: Tensor, still: Tensor, fresh: bool) -> Tensor:
    return torch.where(still, kept, y) if fresh else apply(_Settled, y, kept, still)


class _Settled(torch.autograd.Function):
    """``kept`` where a channel is still, with the derivatives of ``y``: those by ε are not 0 where ε is."""

    generate_vmap_rule = True

    @staticmethod
    def plain(y: Tensor, kept: Tensor, still: Tensor) -> Tensor:
        return torch.where(still, kept.detach() + (y - y.detach()), y)

    @staticmethod
    def forward(y: Tensor, kept: Tensor, still: Tensor) -> Tensor:
        return torch.where(still, kept, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def curve(kind: type[_Curve], m: Tensor, e: Tensor, fresh: bool, *, inplace: bool = False) -> Tensor:
    """f(e·m)/e, with e () or (C_out,); where e is 0 any finite value, with the derivatives that it has there.

    ``inplace``: without autograd m may be overwritten.
    """
    e = per_channel(e.to(m.dtype))
    return kind.value(m, e, inplace) if fresh else apply(kind, m, e)


class _Curve(torch.autograd.Function):
    """Base of the curves: keeps its result for the backward pass, and m only where e is trained."""

    generate_vmap_rule = True

    @staticmethod
    def value(m: Tensor, e: Tensor, inplace: bool) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def slope(y: Tensor, e: Tensor) -> Tensor:
        """dy/dm, of y: a new tensor."""
        raise NotImplementedError

    @staticmethod
    def turn(m: Tensor, y: Tensor, e: Tensor, slope: Tensor) -> Tensor:
        """dy/de."""
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        m, e = inputs
        ctx.save_for_backward(*((output, e, m) if ctx.needs_input_grad[1] else (output, e)))

    @classmethod
    def derivatives(cls, ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        y, e, *rest = ctx.saved_tensors
        if rest and torch.is_grad_enabled():  # a double backward is being recorded: y has to have its value there too
            y = torch.where(is_still(e), y + (rest[0] - y).detach(), y)
        slope = cls.slope(y, e)
        if not rest:
            return (grad * slope if torch.is_grad_enabled() else slope.mul_(grad)), None
        turn = cls.turn(rest[0], y, e, slope)
        return grad * slope, (grad * turn).sum_to_size(e.shape)


def _times(m: Tensor, e: Tensor, inplace: bool) -> Tensor:
    return m.mul_(e) if inplace else m * e


def _divisor(e: Tensor) -> Tensor:
    return torch.where(is_still(e), 1.0, e)


def _series(z: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """c₀ + c₁z + c₂z² + …"""
    total = z * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        total = (total + coefficient) * z
    return total + coefficients[0]


class Saturating(_Curve):
    """tanh(e·m)/e."""

    @staticmethod
    def forward(m: Tensor, e: Tensor) -> Tensor:
        return Saturating.value(m, e, False)

    @staticmethod
    def plain(m: Tensor, e: Tensor) -> Tensor:
        z = m * e
        near = z.abs() < _NEAR
        apart = torch.where(near, 1.0, z)
        return m * torch.where(near, _series(z.square(), _TANH), apart.tanh() / apart)

    @staticmethod
    def value(m: Tensor, e: Tensor, inplace: bool) -> Tensor:
        return tanh(_times(m, e, inplace), True).div_(_divisor(e))

    @staticmethod
    def slope(y: Tensor, e: Tensor) -> Tensor:
        return 1 - (y * e).square()

    @staticmethod
    def turn(m: Tensor, y: Tensor, e: Tensor, slope: Tensor) -> Tensor:
        z = m * e
        zz = z.square()
        near = m.square() * z * _series(zz, tuple(2 * n * t for n, t in enumerate(_TANH) if n))
        return torch.where(z.abs() < _NEAR, near, (m * slope - y) / _divisor(e))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return Saturating.derivatives(ctx, grad)


class Exponential(_Curve):
    """(exp(e·m) − 1)/e."""

    @staticmethod
    def forward(m: Tensor, e: Tensor) -> Tensor:
        return Exponential.value(m, e, False)

    @staticmethod
    def plain(m: Tensor, e: Tensor) -> Tensor:
        z = m * e
        near = z.abs() < _NEAR
        apart = torch.where(near, 1.0, z)
        return m * torch.where(near, _series(z, _EXPM1), apart.expm1() / apart)

    @staticmethod
    def value(m: Tensor, e: Tensor, inplace: bool) -> Tensor:
        return _times(m, e, inplace).expm1_().div_(_divisor(e))

    @staticmethod
    def slope(y: Tensor, e: Tensor) -> Tensor:
        return y * e + 1

    @staticmethod
    def turn(m: Tensor, y: Tensor, e: Tensor, slope: Tensor) -> Tensor:
        z = m * e
        near = m.square() * _series(z, tuple(n * t for n, t in enumerate(_EXPM1) if n))
        return torch.where(z.abs() < _NEAR, near, (m * slope - y) / _divisor(e))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return Exponential.derivatives(ctx, grad)


class Rooted(_Curve):
    """(√(1 + 2e·m) − 1)/e as m/(½ + √(¼ + e·m/2)), which does not cancel; below 0 the root is 0, and its derivative."""

    @staticmethod
    def forward(m: Tensor, e: Tensor) -> Tensor:
        return Rooted.value(m, e, False)

    @staticmethod
    def plain(m: Tensor, e: Tensor) -> Tensor:
        return m / (Root.plain(m * (e / 2) + 0.25) + 0.5)

    @staticmethod
    def value(m: Tensor, e: Tensor, inplace: bool) -> Tensor:
        below = (m * (e / 2)).add_(0.25).clamp_min_(0).sqrt_().add_(0.5)
        return m.div_(below) if inplace else m / below

    @staticmethod
    def slope(y: Tensor, e: Tensor) -> Tensor:
        return reciprocal_or_zero(y * e + 1)

    @staticmethod
    def turn(m: Tensor, y: Tensor, e: Tensor, slope: Tensor) -> Tensor:
        return y.square() * slope * -0.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return Rooted.derivatives(ctx, grad)
