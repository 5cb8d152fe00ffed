"""A convolution with the BatchNorm behind it folded in, and the block operator that changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from convsurgery.geometry import Block, Cost, Site
from convsurgery.operators.base import Built, OperatorConfig, Start, register_operator

__all__ = ["Fused", "batchnorm_affine", "without_affine"]

_KNOWN = ("BatchNorm2d", "SyncBatchNorm", "FrozenBatchNorm2d", "BatchNormAct2d", "FrozenBatchNormAct2d")


def batchnorm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a BatchNorm computes in eval mode, as gain and bias for each channel in float64, (C,)."""
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    gain = torch.rsqrt(var.double() + float(norm.eps))  # type: ignore[arg-type]
    if isinstance(norm.weight, Tensor):
        gain = gain * norm.weight.detach()
    bias = -mean * gain
    if isinstance(norm.bias, Tensor):
        bias = bias + norm.bias.detach()
    return gain, bias


def without_affine(norm: nn.Module) -> nn.Module | None:
    """What remains of a normalisation layer once its affine is gone; None for kinds that are not known."""
    kind = type(norm).__name__
    if kind in ("BatchNorm2d", "SyncBatchNorm", "FrozenBatchNorm2d"):
        return nn.Identity()
    if kind in ("BatchNormAct2d", "FrozenBatchNormAct2d"):
        return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
    return None


@register_operator("fused")
@dataclass(frozen=True)
class Fused(OperatorConfig):
    """One Conv2d that computes what convolution and BatchNorm computed in eval mode: ``conv-bn->fused``.

    w ← g·w, b ← g·(b − μ) + β with g = γ / √(σ² + ε) for each output channel, computed in float64 and rounded once. For
    deployment: in training there is no normalisation any more.
    """

    summary: ClassVar[str] = "convolution and BatchNorm folded into one convolution"
    formula: ClassVar[str] = "γ(wᵀx + b − μ)/√(σ² + ε) + β"
    source: ClassVar[str] = "Ioffe and Szegedy 2015, algorithm 2"
    starts: ClassVar[dict[str, str]] = {"copy": "exact"}
    patterns: ClassVar[tuple[str, ...]] = ("conv-bn",)

    def refuses_block(self, block: Block, sites: Sequence[Site]) -> str | None:
        if block.kinds[-1] not in _KNOWN:
            return f"{block.members[-1]} is a {block.kinds[-1]}, whose forward is not known to be a BatchNorm's"
        if not block.chain:
            return f"{block.members[-1]} is used elsewhere too"
        return None

    def block_cost(self, block: Block, sites: Sequence[Site]) -> Cost:
        geometry = sites[0].geometry
        return Cost(geometry.out_channels * (geometry.patch + 1), sites[0].cost.macs)

    def build_block(self, module: nn.Module, block: Block, start: Start) -> Built:
        assert isinstance(module, nn.Sequential)
        conv, norm = module[0], module[-1]
        assert isinstance(conv, nn.Conv2d)
        gain, bias = batchnorm_affine(norm)
        if conv.bias is not None:
            bias = bias + gain * conv.bias.detach()
        with torch.device("meta"):
            fused = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                conv.dilation,  # type: ignore[arg-type]
                conv.groups,
                padding_mode=conv.padding_mode,
            )
        weight = conv.weight.detach() * gain.view(-1, 1, 1, 1)
        trains = conv.weight.requires_grad
        fused.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=trains)
        fused.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=trains)
        return Built(fused.train(conv.training), rest=without_affine(norm))
