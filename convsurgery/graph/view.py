"""Questions about the nodes of a traced region: what kind of layer each is, what follows it, what comes before."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm

from convsurgery.graph.tracing import Region, keeps_statistics

__all__ = ["View", "is_batchnorm", "same_function"]

_ACTIVATIONS = frozenset(
    [
        "celu",
        "elu",
        "gelu",
        "glu",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "logsigmoid",
        "mish",
        "prelu",
        "relu",
        "relu6",
        "rrelu",
        "selu",
        "sigmoid",
        "silu",
        "softplus",
        "softshrink",
        "softsign",
        "swish",
        "tanh",
        "tanhshrink",
    ]
)
_NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)
#: functions of the same meaning, in place or not
_SAME = {
    operator.iadd: operator.add,
    torch.add: operator.add,
    "add": operator.add,
    "add_": operator.add,
    operator.imul: operator.mul,
    torch.mul: operator.mul,
    "mul": operator.mul,
    "mul_": operator.mul,
    torch.relu: F.relu,
    torch.relu_: F.relu,
    F.relu_: F.relu,
    "relu": F.relu,
    "relu_": F.relu,
    torch.sigmoid: F.sigmoid,
    "sigmoid": F.sigmoid,
    torch.sigmoid_: F.sigmoid,
    "sigmoid_": F.sigmoid,
    torch.tanh: F.tanh,
    "tanh": F.tanh,
    torch.tanh_: F.tanh,
    "tanh_": F.tanh,
    torch.flatten: "flatten",
}


#: a += b and its like
_IN_PLACE = frozenset(
    getattr(operator, f"i{name}")
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"]
)


def same_function(target: Any) -> Any:
    """One name for the several ways to write a function: ``a + b``, ``torch.add(a, b)``, ``a.add_(b)``."""
    return _SAME.get(target, target)


def is_batchnorm(module: nn.Module | None) -> bool:
    """A batch normalisation over images with statistics, torchvision's frozen one included."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm3d):
        return False
    frozen = type(module).__name__ == "FrozenBatchNorm2d"
    return module is not None and (frozen or isinstance(module, _BatchNorm)) and keeps_statistics(module)


class View:
    """A region with the modules it calls.

    Args:
        region: the graph.
        modules: every module of the model by every name.
    """

    def __init__(self, region: Region, modules: Mapping[str, nn.Module]) -> None:
        self.region, self.modules = region, modules
        self.nodes: list[fx.Node] = list(region.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}

    def name(self, node: fx.Node) -> str:
        """Name in the model of the module that ``node`` calls."""
        return self.region.absolute(node.target)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls, if it calls one."""
        return self.modules.get(self.name(node)) if node.op == "call_module" else None

    def is_conv(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), nn.Conv2d)

    def is_identity(self, node: fx.Node) -> bool:
        return type(self.module(node)) is nn.Identity

    def is_norm(self, node: fx.Node) -> bool:
        """Any normalisation layer, by the convention that its class is called so."""
        module = self.module(node)
        return module is not None and "norm" in type(module).__name__.lower() and not self.holds_conv(node)

    def is_activation(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            home = type(module).__module__
            named = home == activation.__name__ or home.startswith("timm.layers.activations")
            return named and not isinstance(module, _NO_ACTIVATIONS)
        if node.op == "call_method":
            return str(node.target).removesuffix("_") in _ACTIVATIONS
        if node.op == "call_function":
            home = getattr(node.target, "__module__", None) or ""
            own = home.startswith(("torch", "timm.layers.activations")) or home == "_operator"
            return own and getattr(node.target, "__name__", "").removesuffix("_") in _ACTIVATIONS
        return False

    def has_activation(self, norm: nn.Module | None) -> bool:
        """Whether a normalisation layer ends in an activation of its own, as timm's do."""
        inner = getattr(norm, "act", None)
        return isinstance(inner, nn.Module) and not isinstance(inner, nn.Identity)

    def is_pass(self, node: fx.Node) -> bool:
        """A layer that works value by value, or normalises: what may stand between the convolutions of a chain."""
        dropout = isinstance(self.module(node), nn.modules.dropout._DropoutNd)
        return self.is_identity(node) or self.is_norm(node) or self.is_activation(node) or dropout

    def is_add(self, node: fx.Node) -> bool:
        """A sum of two results."""
        if node.op not in ("call_function", "call_method") or same_function(node.target) is not operator.add:
            return False
        return len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args) and not node.kwargs

    def holds_conv(self, node: fx.Node) -> bool:
        """Whether the module that ``node`` calls is a convolution or has one inside."""
        module = self.module(node)
        return module is not None and any(isinstance(part, nn.Conv2d) for part in module.modules())

    def mutates(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether ``node`` may write into ``value``."""
        if value not in node.all_input_nodes:
            return False
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        if node.kwargs.get("inplace") or node.kwargs.get("out") is value:
            return True
        # F.relu(x, True): in-place flags may be given by position.
        flagged = node.op == "call_function" and any(arg is True for arg in node.args) and self.is_activation(node)
        name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
        writes = name.endswith("_") and not name.endswith("__")
        return bool(node.args) and node.args[0] is value and (flagged or writes or node.target in _IN_PLACE)

    def describe(self, node: fx.Node) -> str:
        """A node as an error names it."""
        if node.op == "call_module":
            return f"{self.name(node)} ({type(self.module(node)).__name__})"
        if node.op == "output":
            return "the output of " + (self.region.name or "the model")
        if node.op == "placeholder":
            return f"the input {node.target}"
        return str(getattr(node.target, "__name__", node.target))

    def next(self, node: fx.Node) -> fx.Node | None:
        """The one consumer of ``node``, identities passed over; None for several."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            if not self.is_identity(user):
                return user
            node = user
        return None

    def why_no_next(self, node: fx.Node) -> str:
        """Why :meth:`next` gave None."""
        while len(node.users) == 1:
            node = next(iter(node.users))
        users = ", ".join(self.describe(user) for user in list(node.users)[:3])
        return f"its output goes to {len(node.users)} places: {users}" if users else "its output is not used"

    @cached_property
    def ancestors(self) -> list[int]:
        """For each node the set of nodes it depends on, itself included, as a bit mask."""
        masks: list[int] = []
        for i, node in enumerate(self.nodes):
            mask = 1 << i
            for source in node.all_input_nodes:
                mask |= masks[self.position[source]]
            masks.append(mask)
        return masks

    def upstream(self, node: fx.Node) -> int:
        return self.ancestors[self.position[node]]

    def members(self, mask: int) -> list[fx.Node]:
        """The nodes of a bit mask, in execution order."""
        found = []
        while mask:
            low = mask & -mask
            found.append(self.nodes[low.bit_length() - 1])
            mask ^= low
        return found
