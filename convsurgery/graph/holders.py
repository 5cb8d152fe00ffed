"""Who holds a module besides its parents: lists, dictionaries and attributes that ``named_modules`` does not show."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Place", "held_values", "holders"]

#: what every module has, looked after by torch itself: children, parameters, hooks
_TABLES = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
_ATOMS = (bool, int, float, complex, str, bytes, type(None), type, Tensor, torch.dtype, torch.device, types.ModuleType)
#: deeper, or more than this of one model, is not looked through
_DEPTH, _MOST = 8, 200_000


@dataclass(frozen=True)
class Place:
    """One reference to a module from outside the table of children.

    Attributes:
        text: how a person finds it: ``layer1.convs['a']``.
        get, put: read and exchange what stands there; ``put`` is None where it cannot be exchanged (a closure, a bound
            method, a frozen set), ``why`` then says what it is.
    """

    text: str
    get: Callable[[], Any]
    put: Callable[[Any], None] | None
    why: str = ""


@dataclass
class _Scan:
    registered: set[int]
    found: dict[int, list[Place]] = field(default_factory=dict)
    kinds: tuple[type, ...] = (nn.Module,)
    seen: set[int] = field(default_factory=set)
    left: int = _MOST

    def value(self, place: Place, depth: int) -> None:
        item = place.get()
        if isinstance(item, _ATOMS) or self.left <= 0 or depth > _DEPTH:
            return
        self.left -= 1
        if isinstance(item, self.kinds):
            self.found.setdefault(id(item), []).append(place)
        if id(item) in self.registered:
            return
        if id(item) in self.seen:
            return
        self.seen.add(id(item))
        for inner in _inside(item, place):
            self.value(inner, depth + 1)


def holders(model: nn.Module) -> dict[int, list[Place]]:
    """For the ``id`` of every module that something in ``model`` holds besides a parent's table: the places.

    Attributes of modules are followed, and in them lists, tuples, dictionaries, sets, deques, objects with attributes,
    modules that nothing registers, partial functions, bound methods and closures.
    """
    return _scanned(model, (nn.Module,))


def held_values(model: nn.Module, kinds: tuple[type, ...]) -> list[Place]:
    """One place for every object of ``kinds`` that attributes of ``model`` hold, followed as :func:`holders` does."""
    return [places[0] for places in _scanned(model, kinds).values()]


def _scanned(model: nn.Module, kinds: tuple[type, ...]) -> dict[int, list[Place]]:
    scan = _Scan({id(module) for module in model.modules()}, kinds=kinds)
    for name, module in model.named_modules():
        label = f"{name}." if name else ""
        for key in list(vars(module)):
            if key not in _TABLES:
                scan.value(_entry(module.__dict__, key, f"{label}{key}"), 0)
    return scan.found


def _inside(item: Any, place: Place) -> Iterator[Place]:
    """The places inside one value."""
    if isinstance(item, dict):
        for key in list(item):
            yield _entry(item, key, f"{place.text}[{key!r:.40}]")
    elif isinstance(item, list | deque):
        for index in range(len(item)):
            yield _entry(item, index, f"{place.text}[{index}]")
    elif isinstance(item, tuple):
        for index in range(len(item)):
            put = None if place.put is None else functools.partial(_put_in_tuple, place, index)
            yield Place(f"{place.text}[{index}]", functools.partial(_item, place, index), put, place.why)
    elif isinstance(item, set):
        for value in list(item):
            yield _member(item, value, f"{place.text} (a set)")
    elif isinstance(item, frozenset):
        for value in item:
            yield _fixed(value, place.text, "a frozen set")
    elif isinstance(item, types.MethodType):
        yield _fixed(item.__self__, place.text, f"its bound method {item.__name__}")
    elif isinstance(item, functools.partial):
        for value in (item.func, *item.args, *item.keywords.values()):
            yield _fixed(value, place.text, "a partial function")
    elif isinstance(item, types.FunctionType):
        cells = (cell.cell_contents for cell in item.__closure__ or () if _filled(cell))
        for value in (*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()):
            yield _fixed(value, place.text, "a function that closes over it")
    elif isinstance(item, nn.Module):  # one that nothing registers
        for key in item._modules:
            yield _entry(item._modules, key, f"{place.text}.{key}")
        for key in list(vars(item)):
            if key not in _TABLES:
                yield _entry(item.__dict__, key, f"{place.text}.{key}")
    elif isinstance(getattr(item, "__dict__", None), dict):
        for key in list(vars(item)):
            yield _entry(item.__dict__, key, f"{place.text}.{key}")


def _entry(table: Any, key: Any, text: str) -> Place:
    return Place(text, lambda: table[key], lambda new: table.__setitem__(key, new))


def _member(table: set[Any], value: Any, text: str) -> Place:
    held = [value]

    def put(new: Any) -> None:
        table.discard(held[0])
        table.add(new)
        held[0] = new

    return Place(text, lambda: held[0], put)


def _fixed(value: Any, text: str, why: str) -> Place:
    return Place(f"{text} ({why})" if why not in text else text, lambda: value, None, why)


def _put_in_tuple(place: Place, index: int, new: Any) -> None:
    old = place.get()
    items = [*old[:index], new, *old[index + 1 :]]
    assert place.put is not None
    place.put(type(old)(*items) if hasattr(old, "_fields") else type(old)(items))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _item(place: Place, index: int) -> Any:
    return place.get()[index]
