"""Rules: which convolutions to replace, and by what. Text in, frozen objects out; no torch.

>>> from convsurgery.rules import parse
>>> print(parse("first-conv->keep;  conv[k=3,s=1] -> kerv-poly(degree=3)"))
first-conv->keep; conv[k=3, s=1]->kerv-poly(degree=3)
"""

from convsurgery.rules.auto import AutoTarget, Wish
from convsurgery.rules.convert import (
    RuleLike,
    RulesLike,
    SelectorLike,
    SupportsTarget,
    TargetLike,
    as_rules,
    as_target,
)
from convsurgery.rules.keys import KEYS, OPERATORS, NumberKey, TextKey
from convsurgery.rules.model import (
    BY,
    PatternSelector,
    PredicateSelector,
    Rule,
    Rules,
    Selector,
    Target,
    Test,
    failed_tests,
)
from convsurgery.rules.parser import parse, parse_selector, parse_target
from convsurgery.rules.places import PlaceMatch, SelectorPlace, list_selectors, register_selector
from convsurgery.rules.source import Source
from convsurgery.rules.values import ArgValue, Glob, KeyName, Range, Regex, TestValue

__all__ = [
    "BY",
    "KEYS",
    "OPERATORS",
    "ArgValue",
    "AutoTarget",
    "Glob",
    "KeyName",
    "NumberKey",
    "PatternSelector",
    "PlaceMatch",
    "PredicateSelector",
    "Range",
    "Regex",
    "Rule",
    "RuleLike",
    "Rules",
    "RulesLike",
    "Selector",
    "SelectorLike",
    "SelectorPlace",
    "Source",
    "SupportsTarget",
    "Target",
    "TargetLike",
    "Test",
    "TestValue",
    "TextKey",
    "Wish",
    "as_rules",
    "as_target",
    "failed_tests",
    "list_selectors",
    "parse",
    "parse_selector",
    "parse_target",
    "register_selector",
]
