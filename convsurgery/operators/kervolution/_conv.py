"""Tensor pieces all kernels are made of. None materialises patches.

Conventions: ``x`` is the input (N, C_in, H, W), ``w`` the filters (C_out, C_in/groups, kh, kw), a *constant* is a
tensor with one value, or one for each output channel. Reduced precision (a half tensor, or autocast) is used for the
convolution only; what follows runs in float32 and is cast to the dtype the convolution would have returned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convsurgery.operators.precision import REDUCED, no_autocast, no_grad_needed, result_dtype, transformed, widened

TINY = torch.finfo(torch.float32).tiny


class Window(NamedTuple):
    """How the window moves: the arguments of ``F.conv2d`` behind the bias."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def per_channel(constant: Tensor) -> Tensor:
    """A constant in a shape that broadcasts over (N, C, H, W)."""
    return constant if constant.dim() == 0 else constant.view(-1, 1, 1)


def squared_norm(w: Tensor) -> Tensor:
    """‖w_o‖² for each output channel, (C_out,)."""
    return widened(w).square().sum((1, 2, 3))


def inner(x: Tensor, w: Tensor, window: Window, factor: Tensor | None, add: Tensor | None = None) -> Tensor:
    """``factor · wᵀx + add`` for every window, at least float32; ``factor`` and ``add`` are constants.

    In full precision the factor goes into the filters, where it costs nothing. In reduced precision that could
    underflow, so it is multiplied on behind the convolution.
    """
    if result_dtype(x) in REDUCED:
        s = F.conv2d(x, w, None, *window).float()
        if factor is not None:
            s = s * per_channel(factor)
        return s if add is None else s + per_channel(add)
    if factor is not None:
        w = w * (factor if factor.dim() == 0 else factor.view(-1, 1, 1, 1))
    return F.conv2d(x, w, None if add is None else add.expand(w.shape[0]).to(w.dtype), *window)


def exact_inner(x: Tensor, w: Tensor, window: Window, factor: Tensor | None, add: Tensor | None) -> Tensor:
    """As :func:`inner`, with the convolution in at least float32: for terms that cancel against others."""
    with no_autocast(x):
        return inner(widened(x), widened(w), window, factor, add)


def window_squares(x: Tensor, w: Tensor, window: Window) -> Tensor:
    """‖x‖² under every window and group, (N, groups, H_out, W_out), at least float32.

    The squares are summed over the channels of a group first; the sum over the window is then a convolution with
    one channel. Zero padding adds nothing, as it adds nothing to wᵀx.
    """
    groups = window.groups
    with no_autocast(x):
        by_group = widened(x).unflatten(1, (groups, x.shape[1] // groups))
        squares = torch.linalg.vecdot(by_group, by_group, dim=2)
        ones = squares.new_ones((groups, 1, w.shape[2], w.shape[3]))
        summed: Tensor = F.conv2d(squares, ones, None, *window)
        return summed


def add_by_group(s: Tensor, factor: Tensor | None, by_group: Tensor, inplace: bool) -> Tensor:
    """``s + factor · by_group``: a map (N, groups, H, W) added to all channels (N, C_out, H, W) of its group."""
    groups = by_group.shape[1]
    if factor is not None and factor.dim() == 0:
        by_group, factor = by_group * factor, None
    split = s.unflatten(1, (groups, s.shape[1] // groups))
    other = by_group.unsqueeze(2)
    summed: Tensor
    if factor is not None:
        summed = torch.addcmul(split, factor.view(groups, -1, 1, 1), other)
    else:
        summed = split.add_(other) if inplace else split + other
    return summed.flatten(1, 2)


def affine(y: Tensor, gain: Tensor | None, bias: Tensor | None, inplace: bool) -> Tensor:
    """``gain · y + bias``; either may be absent."""
    gain, bias = (None if t is None else t.to(y.dtype) for t in (gain, bias))
    if gain is not None and bias is not None:
        return torch.addcmul(per_channel(bias), y, per_channel(gain))
    if gain is not None:
        return y.mul_(per_channel(gain)) if inplace else y * per_channel(gain)
    if bias is not None:
        return y.add_(per_channel(bias)) if inplace else y + per_channel(bias)
    return y


def overwritable(*tensors: Tensor | None) -> bool:
    """Whether a freshly made result may be overwritten: nothing records or transforms it here."""
    return no_grad_needed(*tensors) and not transformed()


def apply(function: Any, *arguments: Any) -> Tensor:
    """``function.apply``, or inside of transforms ``function.plain``: the same made of torch's own operations."""
    out: Tensor = function.plain(*arguments) if transformed() else function.apply(*arguments)
    return out


def reciprocal_or_zero(d: Tensor) -> Tensor:
    """1/d, and 0 where d is 0."""
    squares = (d * d).clamp_min_(TINY)
    return d / squares if torch.is_grad_enabled() else torch.div(d, squares, out=squares)


class Root(torch.autograd.Function):
    """√max(q, 0), with gradient 0 at 0, where the true one is infinite."""

    generate_vmap_rule = True

    @staticmethod
    def plain(q: Tensor) -> Tensor:
        above = q > 0
        return torch.where(above, torch.where(above, q, 1.0).sqrt(), 0.0)

    @staticmethod
    def forward(q: Tensor) -> Tensor:
        return q.clamp_min(0).sqrt_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return halved_product(grad, reciprocal_or_zero(y))


def halved_product(grad: Tensor, slope: Tensor) -> Tensor:
    """grad · slope / 2; ``slope`` may be overwritten unless a double backward is being recorded."""
    return grad * slope * 0.5 if torch.is_grad_enabled() else slope.mul_(grad).mul_(0.5)


def root(q: Tensor, inplace: bool) -> Tensor:
    return q.clamp_min_(0).sqrt_() if inplace else apply(Root, q)


class Tanh(torch.autograd.Function):
    """tanh(s) as e / (e + 2) with e = expm1(2s): as exact, also near 0, and on CPUs three times as fast."""

    generate_vmap_rule = True

    @staticmethod
    def plain(s: Tensor) -> Tensor:
        return s.tanh()

    @staticmethod
    def forward(s: Tensor) -> Tensor:
        return _tanh_inplace(s.clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad, y)  # type: ignore[no-any-return]


def _tanh_inplace(s: Tensor) -> Tensor:
    # Beyond 20 the result is 1 also in float64, and further out e would be infinite.
    e = s.clamp_max_(20).mul_(2).expm1_()
    return e.div_(e + 2)


def tanh(s: Tensor, inplace: bool) -> Tensor:
    """tanh by whichever way is fastest on this device; compilers and GPUs have a fast one of their own."""
    if s.device.type != "cpu" or torch.compiler.is_compiling():
        return s.tanh_() if inplace else s.tanh()
    return _tanh_inplace(s) if inplace else apply(Tanh, s)
