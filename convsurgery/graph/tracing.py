"""FX tracing with the leaf rules that timm and torchvision register, and ours."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["followers", "owners_read", "trace"]


class _Tracer(fx.Tracer):
    """Keeps convolutions, batch norms and registered modules whole, whatever package they come from."""

    def __init__(self, leaves: tuple[type[nn.Module], ...], functions: tuple[Any, ...]) -> None:
        super().__init__(autowrap_functions=functions)
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # torchvision's own extractor treats its ops (NMS, RoI pooling, ...) as leaves.
        from_package = type(m).__module__.startswith(("torchvision.ops", "convsurgery.operators"))
        return from_package or isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a forward pass; raises whatever FX raises for a model that does not trace."""
    from timm.layers import get_notrace_functions, get_notrace_modules

    leaves = (nn.Conv2d, _BatchNorm, *get_notrace_modules())
    with warnings.catch_warnings():
        # FX warns of what it specialises; the plan says how the model was seen.
        warnings.simplefilter("ignore")
        return _Tracer(leaves, tuple(get_notrace_functions())).trace(model)


def owners_read(graph: fx.Graph) -> set[str]:
    """Names of the modules whose parameters or buffers the graph uses directly; asking for a dtype is no use."""
    return {
        owner
        for node in graph.nodes
        if node.op == "get_attr" and any(user.target is not getattr for user in node.users)
        if (owner := str(node.target).rpartition(".")[0])  # the root's own are used in its own call
    }


def followers(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, str]:
    """For each module called once whose output goes to one BatchNorm2d alone: the name of that BatchNorm.

    ``modules`` holds every name of every module. The BatchNorm too must be called once, and keep running statistics.
    """
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    found = {}
    for node in graph.nodes:
        if node.op != "call_module" or len(node.users) != 1 or calls[id(modules[str(node.target)])] != 1:
            continue
        user = next(iter(node.users))
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            continue
        norm = modules[str(user.target)]
        if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) or calls[id(norm)] != 1:
            continue
        if isinstance(norm.running_mean, torch.Tensor) and isinstance(norm.running_var, torch.Tensor):
            found[str(node.target)] = str(user.target)
    return found
