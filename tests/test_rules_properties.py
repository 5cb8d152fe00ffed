"""Properties of the rule language, over generated rules and over arbitrary text."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convsurgery import rules
from convsurgery.errors import RuleError
from convsurgery.geometry import ConvGeometry, Site
from convsurgery.rules import (
    BY,
    KEYS,
    OPERATORS,
    AutoTarget,
    Glob,
    KeyName,
    NumberKey,
    Range,
    Regex,
    Rule,
    Rules,
    Selector,
    Target,
    Wish,
    list_selectors,
    parse,
)
from convsurgery.rules.values import format_argument

NATURALS = st.integers(0, 10**30 - 1)
WORDS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,8}", fullmatch=True)


def possible(make, *arguments):
    """The object, or None where the generator hit on one that is refused."""
    try:
        return make(*arguments)
    except RuleError:
        return None


def objects(make, *strategies):
    return st.builds(lambda *arguments: possible(make, *arguments), *strategies).filter(lambda made: made is not None)


REGEXES = objects(Regex, st.text(r"ab/\.*+[](){}|^$;,=->\'é ", min_size=1, max_size=8))
GLOBS = objects(Glob, st.text("ab01._*?-[]!é:", min_size=1, max_size=8))
RANGES = st.tuples(NATURALS, NATURALS).map(lambda pair: Range(min(pair), max(pair)))
NUMBERS = st.one_of(NATURALS, st.tuples(NATURALS, NATURALS), RANGES, st.sampled_from(sorted(KEYS)).map(KeyName))
TESTS = st.sampled_from(sorted(KEYS)).flatmap(
    lambda key: objects(
        rules.Test,
        st.just(key),
        st.sampled_from(OPERATORS[:2]) if not isinstance(KEYS[key], NumberKey) else st.sampled_from(OPERATORS),
        NUMBERS if isinstance(KEYS[key], NumberKey) else st.one_of(GLOBS, REGEXES),
    )
)
PLACES = st.sampled_from([place.name for place in list_selectors()])
SELECTORS = objects(Selector, PLACES, st.lists(TESTS, max_size=3).map(tuple))
VALUES = st.one_of(st.integers(-(10**30) + 1, 10**30 - 1), st.floats(allow_nan=False), st.booleans(), st.none(), WORDS)
ARGUMENTS = st.lists(
    st.tuples(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True), VALUES),
    max_size=4,
    unique_by=lambda arg: arg[0],
)
STARTS = st.builds(
    lambda name, key, value: name if value is None else f"{name}({key}{format_argument(value)})",
    st.from_regex(r"[a-z][a-z0-9-]{0,6}", fullmatch=True),
    st.sampled_from(["", "eps=", "t="]),
    st.one_of(st.none(), st.integers(0, 10**6), st.floats(allow_nan=False), WORDS),
)
TARGETS = objects(Target, WORDS.filter(lambda word: word != "auto"), ARGUMENTS.map(tuple), st.just("") | STARTS)
WISHES = st.one_of(
    st.builds(
        lambda metric, percent: Wish(metric, "<=", percent / 1000),
        st.sampled_from(["params", "macs", "latency"]),
        st.integers(-999, -1),
    ),
    st.integers(0, 1000).map(lambda share: Wish("agreement", ">=", share / 1000)),
)
AUTOS = objects(
    lambda options, wishes: AutoTarget("auto", options=tuple(options), wishes=tuple(wishes)),
    st.lists(TARGETS, min_size=1, max_size=3),
    st.lists(WISHES, max_size=2, unique_by=lambda wish: wish.metric),
)
RULES = st.lists(st.builds(Rule, SELECTORS, TARGETS | AUTOS), min_size=1, max_size=3).map(
    lambda made: Rules(tuple(made))
)

# Text that comes near the language gets deeper into the parser than arbitrary text.
SIGNS = ["->", *"[](),;=<>-./\\ \n\x00é|%", "!=", ">=", "{99999999999}", "(?", " by ", "auto("]
WORDED = [
    "first-conv",
    "conv",
    "k",
    "cin",
    "index",
    "name",
    "in",
    "3",
    "3x5",
    "0..4",
    "cout",
    "a.*",
    "/a\\/b/",
    "1e-3",
    "x",
    "fit",
    "params<=-40%",
]
PIECES = st.sampled_from(SIGNS + WORDED)
NEAR_TEXTS = st.lists(PIECES, max_size=14).map("".join)


@given(RULES)
def test_text_and_objects_are_each_others_inverse(made):
    parsed = parse(str(made))
    assert parsed == made
    assert str(parsed) == str(made)


@given(RULES)
def test_the_types_of_arguments_survive(made):
    for before, after in zip(made, parse(str(made)), strict=True):
        assert [type(value) for _, value in before.target.args] == [type(value) for _, value in after.target.args]


@given(RULES, st.sampled_from([" ", "\n", "\t ", ";\n;"]))
def test_every_object_knows_where_it_was_written(made, blank):
    text = blank + str(made) + blank
    for rule in parse(text):
        for part in (rule, rule.selector, *rule.selector.tests):
            error = part.error("")
            assert text[error.start : error.end] == str(part)
        auto = isinstance(rule.target, AutoTarget)
        for part in (rule.target, *rule.target.options, *rule.target.wishes) if auto else ():
            error = part.error("")
            assert text[error.start : error.end] == (part.name if type(part) is Target else str(part))
        for target in rule.target.options if auto else (rule.target,):
            error = target.error("")
            assert text[error.start : error.end] == target.name
            for name, _ in target.args:
                error = target.error("", name)
                assert text[error.start : error.end].startswith(name + "=")
            if target.by:
                error = target.error("", BY)
                assert text[error.start : error.end] == target.by


@settings(max_examples=400)
@given(st.one_of(st.text(), NEAR_TEXTS))
@example("conv[name=/" + "(" * 5000 + "/]->x")
@example("conv[cin=" + "9" * 5000 + "]->x(a=" + "9" * 5000 + ")")
@example("conv[name=[z-a]]->x")
def test_text_is_read_or_refused_with_a_caret_inside_it(text):
    try:
        parsed, refused = parse(text), None
    except RuleError as error:
        parsed, refused = None, error
    if refused is None:
        assert parse(str(parsed)) == parsed
    else:
        assert refused.text == text
        assert 0 <= refused.start <= len(text)
        assert str(refused).startswith(refused.message)


SITES = st.builds(
    lambda k, s, groups, index, shape, name: Site(
        names=(name,), index=index, geometry=ConvGeometry(4, 4, k, stride=s, groups=groups), input_shape=shape
    ),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([1, 2, 4]),
    st.integers(-1, 5),
    st.one_of(st.none(), st.just((1, 4, 8, 9))),
    st.sampled_from(["", "conv1", "layer1.0.conv1"]),
)


@given(SELECTORS, st.lists(SITES, min_size=1, max_size=4))
def test_a_selector_takes_a_site_or_says_why_not(selector, sites):
    for site in sites:
        reason = selector.reason(site, sites)
        if reason is None:
            assert site.index >= 0
            assert not selector.structural
            assert all(test.matches(site) for test in selector.tests)
        else:
            assert reason


@pytest.mark.parametrize(("op", "opposite"), [("=", "!="), (">=", "<"), (">", "<=")])
@given(site=SITES, bound=st.integers(0, 8))
def test_comparisons_of_one_number_are_complete(op, opposite, site, bound):
    for key in ("groups", "cin", "calls"):
        assert rules.Test(key, op, bound).matches(site) != rules.Test(key, opposite, bound).matches(site)
