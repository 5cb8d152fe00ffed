"""Copies of models, also of those that ``copy.deepcopy`` alone refuses."""

from __future__ import annotations

import copy
import io
import socket
import threading
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convsurgery.errors import ModelError
from convsurgery.graph.holders import held_values

__all__ = ["UNCOPIED", "computed_attributes", "copy_model", "copy_modules"]

Model = TypeVar("Model", bound=nn.Module)


def computed_attributes(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> dict[int, Any]:
    """A memo for ``copy.deepcopy`` that puts ``replace(tensor)`` in place of tensors that carry autograd history.

    Old-style weight norm and pruning leave such tensors on modules; deepcopy refuses them.
    """
    return {
        id(value): replace(value.detach())
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


@torch.inference_mode(False)
def copy_model(model: Model) -> Model:
    """An independent copy of ``model``, shared tensors shared in it too; locks are new ones, which nobody holds.

    Its tensors can be trained also where this is called inside of ``torch.inference_mode``.

    Raises:
        ModelError: for one that holds what cannot be copied, such as an open file; it names the attribute.
    """
    try:
        return copy.deepcopy(model, computed_attributes(model, Tensor.clone))
    except TypeError:
        memo = computed_attributes(model, Tensor.clone)
        for place in held_values(model, UNCOPIED):
            value = place.get()
            fresh = _FRESH.get(type(value))
            if fresh is None:
                raise ModelError(
                    f"{place.text} is a {type(value).__name__}, which cannot be copied: take it out of the model, or "
                    "convert in place with convert_"
                ) from None
            memo[id(value)] = fresh(value)
        return copy.deepcopy(model, memo)


def _generator(value: torch.Generator) -> torch.Generator:
    made = torch.Generator(value.device)
    made.set_state(value.get_state())
    return made


_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())
_FRESH: dict[type, Callable[[Any], Any]] = {
    _LOCK: lambda _: threading.Lock(),
    _RLOCK: lambda _: threading.RLock(),
    torch.Generator: _generator,
}
#: what ``copy.deepcopy`` refuses
UNCOPIED = (*_FRESH, io.IOBase, types.GeneratorType, types.CoroutineType, socket.socket, types.FrameType)


_ATOMS = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, types.FunctionType)
#: how a class may say that it is copied in a way of its own
_COPYING = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")
#: what every module has: its children, parameters and hooks, never shared with another module
_TABLES = frozenset(vars(nn.Module()))


def copy_modules(model: Model, memo: dict[int, Any]) -> Model:
    """``copy.deepcopy(model, memo)`` in a fraction of its time: most of a module's attributes are empty or atoms."""
    if id(model) in memo:
        known: Model = memo[id(model)]
        return known
    kind = type(model)
    if any(getattr(kind, name, None) != getattr(nn.Module, name, None) for name in _COPYING):
        # Its class knows better: TorchScript, GraphModule, adapted and rewritten layers.
        return copy.deepcopy(model, memo)
    twin = kind.__new__(kind)
    memo[id(model)] = twin
    for name, value in vars(model).items():
        if name == "_compiled_call_impl":  # torch leaves it out of copies too
            continue
        twin.__dict__[name] = _copy_table(value, memo) if name in _TABLES else _copy_value(value, memo)
    return twin


def _copy_table(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        return type(value)((key, _copy_value(item, memo)) for key, item in value.items()) if value else type(value)()
    return set(value) if isinstance(value, set) else value if isinstance(value, _ATOMS) else copy.deepcopy(value, memo)


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, _ATOMS) or (type(value) is tuple and all(isinstance(item, _ATOMS) for item in value)):
        return value
    return copy_modules(value, memo) if isinstance(value, nn.Module) else copy.deepcopy(value, memo)
