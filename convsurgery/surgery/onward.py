"""Moving a layer's output gain into the convolution that consumes it, for deployment."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from convsurgery.graph import Region

__all__ = ["consumers", "scale_inputs"]

#: what a positive gain of a channel passes through unchanged
_MODULES = (nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Identity)
_FUNCTIONS = (F.relu, torch.relu, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.leaky_relu, F.dropout)


def consumers(regions: Sequence[Region], modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Pairs of a module and the plain Conv2d that alone consumes its output, through nothing but positive scalings.

    ``modules`` holds every name of every module. Both are called at one place.
    """
    calls = Counter(
        id(modules[region.absolute(node.target)])
        for region in regions
        for node in region.graph.nodes
        if node.op == "call_module"
    )
    for region in regions:
        for node in region.graph.nodes:
            if node.op != "call_module" or calls[id(modules[region.absolute(node.target)])] != 1:
                continue
            end = _end(node, region, modules)
            if end is not None and calls[id(modules[end])] == 1:
                yield region.absolute(node.target), end


def _end(node: fx.Node, region: Region, modules: Mapping[str, nn.Module]) -> str | None:
    while len(node.users) == 1:
        (user,) = node.users
        if not user.args or user.args[0] is not node or user.all_input_nodes != [node]:
            return None
        if user.op == "call_module":
            module = modules[region.absolute(user.target)]
            # Exactly these: a subclass may compute something else, and a convolution that reflects does not scale less.
            if type(module) is nn.Conv2d:
                return region.absolute(user.target)
            if type(module) not in _MODULES or (isinstance(module, nn.MaxPool2d) and module.return_indices):
                return None
        elif not (user.op == "call_function" and user.target in _FUNCTIONS and user.target is not operator.add):
            return None
        node = user
    return None


def scale_inputs(conv: nn.Conv2d, gain: Tensor) -> nn.Conv2d:
    """A copy of ``conv`` whose input channels are multiplied by ``gain``, (C_in,), beforehand."""
    by_group = gain.double().to(conv.weight.device).view(conv.groups, -1)
    each = by_group.repeat_interleave(conv.out_channels // conv.groups, 0)
    scaled = conv.weight.detach().double() * each[:, :, None, None]
    options = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
    new = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device="meta",
        **options,
    )
    new.weight = nn.Parameter(scaled.to(conv.weight), requires_grad=False)
    new.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
    return new.train(conv.training)
