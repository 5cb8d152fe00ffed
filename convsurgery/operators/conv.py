"""The null operator: an ordinary convolution, rebuilt. What stays bit-equal under it was only moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from convsurgery.geometry import Site
from convsurgery.operators.base import Built, OperatorConfig, Start, register_operator

__all__ = ["Conv"]


@register_operator("conv")
@dataclass(frozen=True)
class Conv(OperatorConfig):
    """A fresh ``torch.nn.Conv2d`` with the old one's parameters: ``all-conv->conv`` changes no output bit."""

    summary: ClassVar[str] = "the convolution itself, rebuilt"
    formula: ClassVar[str] = "wᵀx"
    source: ClassVar[str] = "the null rule"
    starts: ClassVar[dict[str, str]] = {"copy": "exact", "random": "none"}

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        new = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        ).train(conv.training)
        new.weight, new.bias = conv.weight, conv.bias
        if start.name == "random":
            for name, old in (("weight", conv.weight), ("bias", conv.bias)):
                if old is not None:
                    setattr(new, name, nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(start.value or 0))
                new.reset_parameters()
        return Built(new)
