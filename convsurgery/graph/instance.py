"""What somebody hung on one instance: methods of its own, attributes, tensors, hooks."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from convsurgery.adapters import adapter_for

__all__ = ["own_attributes", "own_method", "state_hooks"]

_STANDARD = frozenset(vars(nn.Conv2d(1, 1, 1, device="meta")))
_CALLABLE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def own_method(module: nn.Module) -> str | None:
    """The name of a method of its class that was replaced on ``module`` alone, such as ``forward``."""
    kind = type(module)
    exact = kind is nn.Conv2d
    for name, value in vars(module).items():
        if name in _STANDARD or not hasattr(kind, name):
            continue
        if exact or isinstance(value, _CALLABLE):
            return name
    return None


def state_hooks(module: nn.Module) -> bool:
    """Whether something changes what ``state_dict`` gives or ``load_state_dict`` takes."""
    return any(vars(module).get(name) for name in _STATE_HOOKS)


def own_attributes(conv: nn.Conv2d) -> dict[str, Any]:
    """What ``conv`` carries besides what makes it a convolution: tensors, children and plain attributes, by name."""
    adapter = adapter_for(conv)
    known = {"weight", "bias"} | (adapter.attributes(conv) if adapter is not None else set())
    plain = {key: value for key, value in vars(conv).items() if key not in _STANDARD}
    held = {**conv._parameters, **conv._buffers, **conv._modules, **plain}
    return {key: value for key, value in held.items() if key not in known and not key.startswith("_convsurgery")}
