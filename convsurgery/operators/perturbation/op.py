"""The torch op of the perturbation layer: y_t = Σ_i V_ti·act(N_i + x_i), Juefei-Xu et al. 2018, eq. 2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convsurgery.geometry import pair
from convsurgery.operators.activations import ACTIVATIONS, activation
from convsurgery.operators.library import define_op
from convsurgery.operators.precision import no_grad_needed, result_dtype

__all__ = ["perturbation"]


def _perturbed(x: Tensor, mask: Tensor | None, act: str, centered: bool, fresh: bool) -> Tensor:
    """act(mask + x), or act(mask + x) − mask: for relu that is max(x, −mask), which loses no digit."""
    if mask is None:
        return activation(x, act, inplace=False)
    if centered and act == "relu":
        return torch.maximum(x, -mask)
    a = activation(x + mask, act, inplace=fresh or act == "relu")
    return a - mask if centered else a


def _mix(a: Tensor, weight: Tensor, bias: Tensor | None, groups: int, dtype: torch.dtype) -> Tensor:
    return F.conv2d(a.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), groups=groups)


class _FanOut(torch.autograd.Function):
    """Several masks for each channel, one at a time in both directions: the perturbed maps are never all there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        masks: Tensor,
        act: str,
        centered: bool,
        groups: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, masks)
        ctx.rest = act, centered, groups, dtype
        return _one_by_one(x, weight, bias, masks, act, centered, groups, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, masks = ctx.saved_tensors
        act, centered, groups, dtype = ctx.rest
        again = torch.is_grad_enabled()  # a double backward is being recorded
        needs_x, needs_weight, needs_bias, needs_masks = ctx.needs_input_grad[:4]
        grad_x: Tensor | None = None
        grad_weights, grad_masks = [], []
        for j in range(masks.shape[1]):
            with torch.enable_grad():
                leaves = [t if again and t.requires_grad else t.detach().requires_grad_() for t in (x, masks[:, j])]
                a = _perturbed(leaves[0], leaves[1], act, centered, False)
            wanted = [leaf for leaf, needed in zip(leaves, (needs_x, needs_masks), strict=True) if needed]
            one = _one_of(weight, masks.shape[1], j).to(dtype)
            window = ([1, 1], [0, 0], [1, 1], False, [0, 0], groups)
            grad_a, grad_w, _ = torch.ops.aten.convolution_backward(
                grad, (a if again else a.detach()).to(dtype), one, None, *window, [bool(wanted), needs_weight, False]
            )
            if needs_weight:
                grad_weights.append(grad_w.to(weight.dtype))
            if wanted:
                found = list(torch.autograd.grad(a, wanted, grad_a.to(a.dtype), create_graph=again))
                if needs_x:
                    part = found.pop(0)
                    grad_x = part if grad_x is None else grad_x + part if again else grad_x.add_(part)
                if needs_masks:
                    grad_masks.append(found[0])
        joined = torch.cat(grad_weights, 2).flatten(1, 2).unsqueeze(-1) if needs_weight else None
        stacked = torch.stack(grad_masks, 1) if needs_masks else None
        return grad_x, joined, grad.sum((0, 2, 3)) if needs_bias else None, stacked, None, None, None, None


def _one_of(weight: Tensor, fanout: int, j: int) -> Tensor:
    """The mix of each channel's j-th mask, (C_out, C_in / groups, 1, 1); masks of a channel lie side by side."""
    one: Tensor = weight.unflatten(1, (-1, fanout))[:, :, j].contiguous()
    return one


def _one_by_one(
    x: Tensor, weight: Tensor, bias: Tensor | None, masks: Tensor, act: str, centered: bool, groups: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    fanout = masks.shape[1]
    y: Tensor | None = None
    for j in range(fanout):
        a = _perturbed(x, masks[:, j], act, centered, True)
        one = _one_of(weight, fanout, j)
        if y is None:
            if centered or groups != 1:  # centred, it is to be the convolution bit for bit
                y = _mix(a, one, bias, groups, dtype)
                del a
                continue
            y = a.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]), dtype=dtype)
            y = y.zero_() if bias is None else y.copy_(bias.view(-1, 1, 1).expand_as(y))
        if groups == 1:
            # Added in place: a convolution would hold one more map.
            y.flatten(2).baddbmm_(one.to(dtype).flatten(1).expand(y.shape[0], -1, -1), a.to(dtype).flatten(2))
        else:
            y.add_(_mix(a, one, None, groups, dtype))
        del a  # before the next is made
    assert y is not None
    return y


def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    masks: Tensor | None,
    fanout: int,
    act: str,
    centered: bool,
    pool: str,
    kernel_size: list[int],
    stride: list[int],
    groups: int,
) -> Tensor:
    if x.shape[1] * fanout != weight.shape[1] * groups:
        channels = weight.shape[1] * groups // fanout
        raise RuntimeError(
            f"the input has {x.shape[1]} channels; the weight mixes {fanout} masks of {channels} channels"
        )
    dtype = result_dtype(x)
    fresh = no_grad_needed(x, weight, bias, masks)
    if masks is not None:
        masks = masks.to(x.dtype)
    if masks is None or fanout == 1:
        mask = None if masks is None else masks.squeeze(1)
        y = _mix(_perturbed(x, mask, act, centered, fresh), weight, bias, groups, dtype)
    elif fresh:
        y = _one_by_one(x, weight, bias, masks, act, centered, groups, dtype)
    else:
        y = _FanOut.apply(x, weight, bias, masks, act, centered, groups, dtype)
    if pool == "max":
        return F.max_pool2d(y, kernel_size, stride)
    return F.avg_pool2d(y, kernel_size, stride) if pool == "avg" else y


define_op(
    "perturbation2d(Tensor input, Tensor weight, Tensor? bias, Tensor? masks, int fanout, str act, bool centered, "
    "str pool, SymInt[2] kernel_size, SymInt[2] stride, SymInt groups) -> Tensor",
    _op,
)


def perturbation(
    input: Tensor,
    weight: Tensor,
    masks: Tensor | None,
    bias: Tensor | None = None,
    *,
    fanout: int | None = None,
    act: str = "relu",
    centered: bool = False,
    pool: str = "none",
    kernel_size: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Noise, a nonlinearity and a 1x1 mix: ``Σ_i weight_ti · act(masks_i + input_i) + bias_t``, then pooling.

    Juefei-Xu et al., *Perturbative Neural Networks* (2018), eq. 2. Several masks for each channel are worked through
    one at a time, in the backward pass too, so that the fanned-out maps are never all in memory.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W).
        weight: (C_out, C_in / groups · m, 1, 1) for m masks for each channel, which lie side by side.
        masks: (C_in, m, H, W), or (1, m, H, W) for all channels alike, or None for no noise at all.
        bias: (C_out,).
        fanout: m; from ``masks`` when absent.
        act: name of the activation, as timm names them.
        centered: take the mask out again behind the activation: ``act(masks + input) − masks``. With relu and masks
            above −input that is the input itself, bit for bit.
        pool: "none", "max" or "avg", behind the mix.
        kernel_size, stride: of the pooling, in pixels; the stride is the kernel size when absent.
        groups: input and output channels are mixed within so many groups.

    Returns:
        (N, C_out, H', W'), in the dtype the convolution would have.

    Raises:
        ValueError: for an unknown activation or pooling, and masks or weights whose shapes do not fit.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> x, v = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 1, 1)
        >>> far = torch.full((3, 1, 8, 8), 100.0)
        >>> torch.equal(CF.perturbation(x, v, far, centered=True), torch.nn.functional.conv2d(x, v))
        True
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; known: {', '.join(sorted(ACTIVATIONS))}")
    if pool not in ("none", "max", "avg"):
        raise ValueError(f"pool must be none, max or avg, not {pool!r}")
    if masks is not None and (
        masks.dim() != 4 or masks.shape[0] not in (1, input.shape[-3]) or masks.shape[-2:] != input.shape[-2:]
    ):
        raise ValueError(
            f"masks of shape {tuple(masks.shape)} do not fit images of {input.shape[-3]} channels and "
            f"{input.shape[-2]}x{input.shape[-1]} pixels: wanted (channels or 1, m, height, width)"
        )
    count = fanout or (1 if masks is None else masks.shape[1])
    if masks is not None and masks.shape[1] != count:
        raise ValueError(f"fanout={count}, but there are {masks.shape[1]} masks for each channel")
    if weight.shape[1] * groups != input.shape[-3] * count:
        raise ValueError(
            f"weight mixes {weight.shape[1] * groups} maps, there are {input.shape[-3]} channels x {count} masks"
        )
    window = pair(kernel_size)
    out: Tensor = torch.ops.convsurgery.perturbation2d(
        input, weight, bias, masks, count, act, centered, pool, window, pair(stride or window), groups
    )
    return out
