"""The registry of places: the word a selector begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from convsurgery.errors import RuleError, nearest
from convsurgery.geometry import Site
from convsurgery.rules.keys import format_number
from convsurgery.rules.values import NAME

__all__ = ["PlaceMatch", "SelectorPlace", "list_selectors", "place_named", "register_selector"]

PlaceMatch = Callable[[Site, Sequence[Site]], str | None]


@dataclass(frozen=True)
class SelectorPlace:
    """A word that names convolutions.

    Attributes:
        name: as written in a rule.
        summary: one line for help texts.
        kind: "site" for single convolutions, "structure" for a pattern of several layers.
        match: for sites; called with a site and all sites of the model, None when it takes the site, else the reason.
        single: whether it names one convolution alone; a skip of that one is then an error.
    """

    name: str
    summary: str
    kind: Literal["site", "structure"] = "site"
    match: PlaceMatch | None = None
    single: bool = False


_PLACES: dict[str, SelectorPlace] = {}


def register_selector(place: SelectorPlace) -> SelectorPlace:
    """Make a place known to the parser; a second one of the same name is an error."""
    if not NAME.fullmatch(place.name):
        raise RuleError(f"{place.name!r} is not a name a rule can hold", hint="letters, digits, '-', '_' and '.'")
    if place.kind == "site" and place.match is None:
        raise RuleError(f"the selector {place.name!r} names sites but has no match function")
    if place.name in _PLACES:
        raise RuleError(f"the selector {place.name!r} is already registered")
    _PLACES[place.name] = place
    return place


def list_selectors() -> tuple[SelectorPlace, ...]:
    """All places in the order of their registration."""
    return tuple(_PLACES.values())


def place_named(name: str) -> SelectorPlace:
    """The registered place; RuleError with the nearest names when there is none."""
    try:
        return _PLACES[name]
    except KeyError:
        raise RuleError(f"unknown selector {name!r}", hint=nearest(name, _PLACES)) from None


def _any(site: Site, sites: Sequence[Site]) -> str | None:
    return None


def _first(site: Site, sites: Sequence[Site]) -> str | None:
    reached = [other for other in sites if other.index >= 0]
    declared = [other for other in reached if other.first]
    return _is_one_of(site, declared or sorted(reached, key=lambda other: other.index)[:1], "first")


def _last(site: Site, sites: Sequence[Site]) -> str | None:
    reached = sorted((other for other in sites if other.index >= 0), key=lambda other: other.index)
    return _is_one_of(site, reached[-1:], "last")


def _is_one_of(site: Site, chosen: Sequence[Site], which: str) -> str | None:
    if site in chosen:
        return None
    verb = "that is" if len(chosen) == 1 else "those are"
    where = f" ({verb} {' and '.join(other.label for other in chosen)})" if chosen else ""
    return f"not the {which} convolution{where}"


def _depthwise(site: Site, sites: Sequence[Site]) -> str | None:
    geometry = site.geometry
    return None if geometry.depthwise else f"not depthwise (groups={geometry.groups}, cin={geometry.in_channels})"


def _pointwise(site: Site, sites: Sequence[Site]) -> str | None:
    geometry = site.geometry
    return None if geometry.pointwise else f"not pointwise (k={format_number(geometry.kernel_size)})"


for _place in (
    SelectorPlace(
        "first-conv",
        "the convolution the model declares as its first, else the first executed",
        match=_first,
        single=True,
    ),
    SelectorPlace("last-conv", "the convolution executed last", match=_last, single=True),
    SelectorPlace("all-conv", "every convolution", match=_any),
    SelectorPlace("conv", "every convolution; reads better with tests, as in conv[k=3]", match=_any),
    SelectorPlace("depthwise", "convolutions with one group per input channel", match=_depthwise),
    SelectorPlace("pointwise", "1x1 convolutions", match=_pointwise),
    SelectorPlace("conv-bn", "a convolution and the BatchNorm that alone consumes its output", "structure"),
    SelectorPlace("conv-bn-act", "these two and the activation behind", "structure"),
    SelectorPlace("conv-act", "a convolution and the activation that alone consumes its output", "structure"),
    SelectorPlace("residual", "everything between y and y + F(y), the sum included", "structure"),
    SelectorPlace("depthwise-separable", "a depthwise convolution over a window, then a pointwise one", "structure"),
    SelectorPlace("bottleneck", "a 1x1, a kxk and a 1x1 convolution in a row", "structure"),
):
    register_selector(_place)
