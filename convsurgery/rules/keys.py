"""The keys a test may ask for, in one table: parser, matching, help texts and docs read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from convsurgery.geometry import Site
from convsurgery.rules.values import Glob, KeyName, Range, Regex, TestValue

__all__ = ["KEYS", "OPERATORS", "NumberKey", "TextKey", "compare", "format_number"]

OPERATORS: Final = ("=", "!=", ">=", "<=", ">", "<")

Pair = tuple[int, int]


@dataclass(frozen=True)
class NumberKey:
    """A key with an integer value, or with one for height and one for width (``pair``)."""

    name: str
    summary: str
    example: str
    read: Callable[[Site], int | Pair | None]
    pair: bool = False

    operators = OPERATORS

    @property
    def wants(self) -> str:
        return f"{self.name} wants an integer{' or HxW' if self.pair else ''}, e.g. {self.example}"

    @property
    def hint(self) -> str:
        others = ", ".join(key.name for key in KEYS.values() if self.comparable(key) and key is not self)
        return f"or a range a..b, or another key: {others}"

    def comparable(self, other: NumberKey | TextKey) -> bool:
        return isinstance(other, NumberKey) and self.pair == other.pair

    def accepts(self, value: TestValue) -> bool:
        if isinstance(value, KeyName):
            return value.name in KEYS and self.comparable(KEYS[value.name])
        if isinstance(value, tuple):
            return self.pair and len(value) == 2 and all(_natural(side) for side in value)
        if isinstance(value, Range):
            return _natural(value.low) and _natural(value.high)
        return _natural(value)


@dataclass(frozen=True)
class TextKey:
    """A key with texts as its value; one that matches is enough."""

    name: str
    summary: str
    example: str
    read: Callable[[Site], tuple[str, ...]]

    operators = OPERATORS[:2]

    @property
    def wants(self) -> str:
        return f"{self.name} wants a glob or a /regex/, e.g. {self.example}"

    @property
    def hint(self) -> str:
        return ""

    def accepts(self, value: TestValue) -> bool:
        return isinstance(value, Glob | Regex)


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 10**30


def _size(site: Site) -> int | None:
    shape = site.input_shape
    return min(shape[-2:]) if shape is not None and len(shape) >= 2 else None


KEYS: Final[dict[str, NumberKey | TextKey]] = {
    key.name: key
    for key in (
        NumberKey("k", "kernel size", "k=3", lambda site: site.geometry.kernel_size, pair=True),
        NumberKey("s", "stride", "s=1", lambda site: site.geometry.stride, pair=True),
        NumberKey("d", "dilation", "d=1", lambda site: site.geometry.dilation, pair=True),
        NumberKey("groups", "groups", "groups=1", lambda site: site.geometry.groups),
        NumberKey("cin", "input channels", "cin>=64", lambda site: site.geometry.in_channels),
        NumberKey("cout", "output channels", "cout>=64", lambda site: site.geometry.out_channels),
        NumberKey("size", "smaller side of the input in pixels", "size>=28", _size),
        NumberKey("index", "position in execution order, from 0", "index=0..4", lambda site: site.index),
        NumberKey("calls", "how often one forward pass calls it", "calls=1", lambda site: site.calls),
        TextKey("name", "any dotted name of the module", "name=layer1.*", lambda site: site.names),
        TextKey("in", "class name of any surrounding module", "in=Bottleneck", lambda site: site.owners),
    )
}


def _pair(value: int | Pair) -> Pair:
    return value if isinstance(value, tuple) else (value, value)


def format_number(value: int | Pair | None) -> str:
    if value is None:
        return "unknown"
    height, width = _pair(value)
    return str(height) if height == width else f"{height}x{width}"


def compare(left: int | Pair, operator: str, right: int | Pair | Range) -> bool:
    """Whether ``left operator right`` holds; an order or a range must hold for height and width both."""
    sides = _pair(left)
    if isinstance(right, Range):
        return all(right.low <= side <= right.high for side in sides) == (operator == "=")
    bounds = _pair(right)
    both = list(zip(sides, bounds, strict=True))
    if operator in ("=", "!="):
        return (sides == bounds) == (operator == "=")
    if operator == ">=":
        return all(side >= bound for side, bound in both)
    if operator == "<=":
        return all(side <= bound for side, bound in both)
    if operator == ">":
        return all(side > bound for side, bound in both)
    return all(side < bound for side, bound in both)
