"""Powers and polynomials of a map, with few new tensors, and their derivatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convsurgery.operators.kervolution._conv import apply, per_channel

__all__ = ["Polynomial", "Power", "coefficients", "dialled_coefficients", "horner", "power"]


class Power(torch.autograd.Function):
    """t^d by repeated multiplication; keeps t alone for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def plain(t: Tensor, degree: int) -> Tensor:
        return t.pow(degree)

    @staticmethod
    def forward(t: Tensor, degree: int) -> Tensor:
        return power(t, degree, inplace=False)

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
            return grad * apply(Power, t, degree - 1) * degree, None
        return power(t, degree - 1, inplace=False).mul_(grad).mul_(degree), None


def power(t: Tensor, degree: int, *, inplace: bool) -> Tensor:
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


class Polynomial(torch.autograd.Function):
    """Σ_j k_j s^j by Horner's rule, j = 0 … d; keeps s alone for the backward pass.

    ``k`` has the coefficients in rows, (d + 1, C, 1, 1), or (d + 1,) where all are alike for all channels: scalars
    cost less than a broadcast.
    """

    generate_vmap_rule = True

    @staticmethod
    def plain(s: Tensor, k: Tensor) -> Tensor:
        y = s * k[-1]
        for row in range(k.shape[0] - 2, 0, -1):
            y = (y + k[row]) * s
        return y + k[0]

    @staticmethod
    def forward(s: Tensor, k: Tensor) -> Tensor:
        return horner(s, k, biased=True)

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
                grad_s = grad * apply(Polynomial, s, slopes)
            else:
                grad_s = horner(s, slopes, biased=True).mul_(grad) if k.shape[0] > 2 else grad * slopes[0]
        if ctx.needs_input_grad[1]:
            rows, term = [], grad
            for _ in range(k.shape[0]):
                rows.append(term.sum_to_size(k.shape[1:]))
                term = term * s
            grad_k = torch.stack(rows)
        return grad_s, grad_k


def coefficients(balance: Tensor, gain: Tensor | None, bias: Tensor | None, degree: int) -> Tensor:
    """Rows k_0 … k_d of g·((s + c)^d − c^d) + b as a polynomial in s."""
    c = per_channel(balance)
    factors = [math.comb(degree, j) * c ** (degree - j) for j in range(1, degree + 1)]
    if gain is not None:
        factors = [per_channel(gain) * factor for factor in factors]
    constant = c.new_zeros(()) if bias is None else per_channel(bias).to(c.dtype)
    return torch.stack(torch.broadcast_tensors(constant, *factors))


def dialled_coefficients(epsilon: Tensor, balance: Tensor, degree: int) -> Tensor:
    """Rows k_0 … k_d of ((εs + c)^d − c^d) / (d c^(d−1) ε): C(d, j) (ε/c)^(j−1) / d, and 0 for j = 0."""
    ratio = per_channel(epsilon / balance)
    one = torch.ones_like(ratio)
    rows = [math.comb(degree, j) / degree * ratio ** (j - 1) for j in range(2, degree + 1)]
    return torch.stack([torch.zeros_like(ratio), one, *rows])


def horner(s: Tensor, k: Tensor, biased: bool) -> Tensor:
    """Σ_j k_j s^j with one new tensor, the result; without ``biased``, k_0 is left out."""
    y = s * k[-1]
    for row in range(k.shape[0] - 2, 0, -1):
        y = y.add_(k[row]).mul_(s)
    return y.add_(k[0]) if biased else y
