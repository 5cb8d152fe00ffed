"""Everything a user may pass where rules are wanted, as Rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

from convsurgery.errors import RuleError
from convsurgery.geometry import Site
from convsurgery.rules.model import PatternSelector, PredicateSelector, Rule, Rules, Selector, Target
from convsurgery.rules.parser import parse, parse_selector, parse_target

__all__ = ["RuleLike", "RulesLike", "SelectorLike", "SupportsTarget", "TargetLike", "as_rules", "as_target"]


@runtime_checkable
class SupportsTarget(Protocol):
    """An operator's config object."""

    def to_target(self) -> Target: ...


SelectorLike = str | Selector | PredicateSelector | PatternSelector | Callable[[Site], bool]
TargetLike = str | Target | SupportsTarget
RuleLike = str | Rule | tuple[SelectorLike, TargetLike]
RulesLike = str | Rule | Rules | Sequence[RuleLike]


def as_rules(value: RulesLike) -> Rules:
    """Rules from a text, a Rule, or a sequence of texts, Rules and pairs ``(selector, target)``.

    >>> str(as_rules([("first-conv", "kerv-poly"), "all-conv[k=1]->keep"]))
    'first-conv->kerv-poly; all-conv[k=1]->keep'
    """
    if isinstance(value, Rules):
        return value
    if isinstance(value, str):
        return parse(value)
    if isinstance(value, Rule):
        return Rules((value,))
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise RuleError(f"rules are a text, a Rule or a sequence of them, not {_kind(value)}")
    return Rules(tuple(rule for item in value for rule in _item(item)))


def _item(item: RuleLike) -> Sequence[Rule]:
    if isinstance(item, str):
        return parse(item).rules
    if isinstance(item, Rule):
        return (item,)
    if isinstance(item, tuple) and len(item) == 2:
        return (Rule(_selector(item[0]), as_target(item[1])),)
    raise RuleError(
        f"a rule is a text, a Rule or a pair (selector, target), not {_kind(item)}",
        hint="a single pair goes into a list: [(selector, target)]",
    )


def _selector(value: SelectorLike) -> Selector | PredicateSelector | PatternSelector:
    if isinstance(value, str):
        return parse_selector(value)
    if isinstance(value, Selector | PredicateSelector | PatternSelector):
        return value
    # A network is callable too, but it is a pattern to look for; known by its method, for no torch is loaded here.
    if hasattr(type(value), "named_modules"):
        return PatternSelector(value)
    if callable(value) and not isinstance(value, type):
        return PredicateSelector(value)
    raise RuleError(
        f"a selector is a text, a Selector, a function on sites or an nn.Module to look for, not {_kind(value)}"
    )


def as_target(value: TargetLike) -> Target:
    """A target from a text such as "kerv-poly(degree=3)", a Target, or an operator's config object."""
    if isinstance(value, str):
        return parse_target(value)
    if isinstance(value, Target):
        return value
    # Asked of the class, so that a config class passed in place of an object is not mistaken for one.
    if hasattr(type(value), "to_target"):
        target = cast("object", value.to_target())
        if isinstance(target, Target):
            return target
        raise RuleError(f"{type(value).__name__}.to_target() gave {_kind(target)}, not a Target")
    hint = f"write {value.__name__}()" if isinstance(value, type) else ""
    raise RuleError(f"a target is a text, a Target or an operator's config, not {_kind(value)}", hint=hint)


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a value of type {type(value).__name__}"
