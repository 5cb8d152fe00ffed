"""Plain data, as JSON gives it: read strictly, and made into the dataclasses that wrote it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from convsurgery.errors import StorageError

__all__ = ["control_characters", "declared", "from_plain", "parse_json"]

T = TypeVar("T")

#: what a terminal takes for a command, and no name needs
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
#: whole numbers: multiply-accumulates of the largest models have 15 digits
_LARGEST = 1 << 62


def control_characters(text: str) -> bool:
    """Whether a text holds what would move a terminal's cursor or turn its writing, tabs and line breaks apart."""
    return _CONTROL.search(text) is not None


def declared(model: Any) -> dict[str, Any]:
    """What a model says of itself as timm's ``pretrained_cfg``; empty where it says nothing, or nothing of that form.

    A stranger's model may carry anything under that name, or a property that raises. A size that no image has is left
    out.
    """
    try:
        found = model.pretrained_cfg
        entries = {key: value for key, value in dict(found).items() if isinstance(key, str)} if found else {}
    except Exception:  # an attribute that is none of ours to judge
        return {}
    size = entries.get("input_size")
    if size is not None and not _is_size(size):
        del entries["input_size"]
    if not isinstance(entries.get("architecture", ""), str):
        del entries["architecture"]
    return entries


#: pixels of the largest image that is made up for a model
_PIXELS = 1 << 26


def _is_size(size: Any) -> bool:
    if not isinstance(size, list | tuple) or len(size) != 3:
        return False
    if not all(isinstance(number, int) and 0 < number < 1 << 20 for number in size):
        return False
    return math.prod(size) <= 3 * _PIXELS


def parse_json(text: str, what: str) -> Any:
    """Plain data of a JSON text: every key once, numbers finite, no control characters but tabs and line breaks.

    Args:
        text: the JSON.
        what: begins every error, such as the file's path.

    Raises:
        StorageError: for anything else.

    >>> parse_json('{"a": 1, "a": 2}', "x.json")
    Traceback (most recent call last):
    convsurgery.errors.StorageError: x.json: the key 'a' is given twice
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise StorageError(f"{what}: the key {twice!r:.80} is given twice")
        return found

    def number(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):
            raise ValueError(f"{word[:40]} is no number that JSON knows")
        return value

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        raise StorageError(f"{what} is not JSON: {'nested too deep' if deep else error}") from error
    left = [data]
    while left:
        item = left.pop()
        if isinstance(item, str) and control_characters(item):
            raise StorageError(f"{what}: a text holds control characters: {item[:60]!r}")
        if isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
    return data


def from_plain(kind: type[T], data: Any, where: str) -> T:
    """A dataclass from the mapping that ``dataclasses.asdict`` and JSON made of it; every field by its annotation.

    Args:
        kind: a dataclass whose fields are numbers, texts, tuples, optional ones of these, and dataclasses.
        data: the mapping; fields with a default may be absent.
        where: begins every error.

    Raises:
        StorageError: naming the field that is missing, unknown or of another kind.

    >>> from convsurgery.geometry import Cost
    >>> from_plain(Cost, {"params": 1, "macs": 2}, "the plan")
    Cost(params=1, macs=2)
    """
    if not isinstance(data, Mapping):
        raise StorageError(f"{where} must be a mapping, not {data!r:.80}")
    hints: dict[str, Any] = _hints(kind)  # type: ignore[arg-type]  # classes can be hashed
    values = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if item.name in data:
            values[item.name] = _value(hints[item.name], data[item.name], f"{where}.{item.name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise StorageError(f"{where} has no {item.name!r}")
    more = [key for key in data if key not in hints]
    if more:
        raise StorageError(f"{where}.{more[0]!s:.80} is nothing that convsurgery writes")
    return kind(**values)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        (rest,) = [part for part in inner if part is not type(None)]
        return _value(rest, value, where)
    if origin is tuple:
        if isinstance(value, list | tuple):
            kinds = [inner[0]] * len(value) if inner[1:] == (...,) else list(inner)
            if len(kinds) == len(value):
                return tuple(_value(part, item, where) for part, item in zip(kinds, value, strict=True))
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        bounded = hint is not int or abs(value) <= _LARGEST
        if bounded:
            return value
    raise StorageError(f"{where} is of the wrong kind: {value!r:.80}")
