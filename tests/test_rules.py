"""Rules: reading, writing, matching, and what the errors say."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

import convsurgery as cs
from convsurgery import rules
from convsurgery.errors import ConvSurgeryError, RuleError
from convsurgery.geometry import ConvGeometry, Site
from convsurgery.rules import (
    AutoTarget,
    Glob,
    KeyName,
    PredicateSelector,
    Range,
    Regex,
    Rule,
    Rules,
    Selector,
    SelectorPlace,
    Target,
    Wish,
    as_rules,
    as_target,
    list_selectors,
    parse,
    parse_selector,
    parse_target,
    places,
    register_selector,
)


def make_site(name="conv1", index=0, cin=64, cout=64, k=(3, 3), s=(1, 1), d=(1, 1), groups=1, **fields):
    fields.setdefault("input_shape", (2, cin, 56, 28))
    names = fields.pop("names", (name,))
    geometry = ConvGeometry(cin, cout, k, stride=s, dilation=d, groups=groups)
    return Site(names=names, index=index, geometry=geometry, **fields)


STEM = make_site("conv1", 0, cin=3, k=(7, 7), s=(2, 2), owners=("ResNet",), input_shape=(2, 3, 224, 224))
BLOCK = make_site("layer1.0.conv1", 1, owners=("BasicBlock", "Sequential", "ResNet"))
DEPTHWISE = make_site("dw", 2, groups=64)
HEAD = make_site("head", 3, cout=10, k=(1, 1), calls=2)
UNREACHED = make_site("unused", -1, input_shape=None, calls=0)
SITES = (HEAD, UNREACHED, DEPTHWISE, BLOCK, STEM)  # registration order is not execution order


def taken(selector: str, sites=SITES) -> set[str]:
    return {site.name for site in sites if parse_selector(selector).reason(site, sites) is None}


# Reading and writing.


def test_parse_builds_the_whole_tree():
    (rule,) = parse("first-conv[k=3, cin=cout] -> kerv-poly(degree=3, balance=1.0, learnable, mode=channel, x=none)")
    assert rule.selector == Selector("first-conv", (rules.Test("k", "=", 3), rules.Test("cin", "=", KeyName("cout"))))
    assert rule.target.name == "kerv-poly"
    assert rule.target.args == (("degree", 3), ("balance", 1.0), ("learnable", True), ("mode", "channel"), ("x", None))
    assert [type(value) for _, value in rule.target.args] == [int, float, bool, str, type(None)]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("first-conv->kerv-poly", None),
        ("first-conv[k=3, s=1]->kerv-poly(degree=3, balance=1)", None),
        (" first-conv\t[ k = 3 ,s=1 ] -> kerv-poly ( degree = 3 ) ", "first-conv[k=3, s=1]->kerv-poly(degree=3)"),
        ("conv->my_pkg.op", None),
        ("all-conv->keep;\n\n;\nconv[k=1]->shift;\n", "all-conv->keep; conv[k=1]->shift"),
        ("conv[k=3x5]->x", None),
        ("conv[k=3x3]->x", "conv[k=3]->x"),
        ("conv[index = 0 .. 4]->x", "conv[index=0..4]->x"),
        ("conv[index=4..4]->x", "conv[index=4]->x"),
        ("conv[k>=3, k<=7, k!=5, cin>1, cin<9]->x", None),
        ("conv[cin>=cout, groups=cin, k=s]->x", None),
        ("conv[name=layer[12].*.conv?, in!=Bottle*]->x", None),
        ("conv[name=/layer[1;2],->\\/x\\d/]->x", None),
        ("conv-bn-act[in=Bottleneck]->x", None),
        ("conv->x()", "conv->x"),
        ("conv->x(learnable)", "conv->x(learnable=true)"),
        ("conv->x(a=True, b=FALSE, c=None)", "conv->x(a=true, b=false, c=none)"),
        ("conv->x(a=1e-3, b=.5, c=1., d=-2, e=+7, f=-inf)", "conv->x(a=0.001, b=0.5, c=1.0, d=-2, e=7, f=-inf)"),
        ("conv->x(a=1e16, b=channel-wise)", "conv->x(a=1e+16, b=channel-wise)"),
        ("conv->x(in=1, name=2, k=3)", None),
        ("conv->x by fit", None),
        ("conv->x  by\n neutral ( 1e-3 )", "conv->x by neutral(0.001)"),
        ("conv->x by neutral(eps = 1e-3); conv->y by blend", "conv->x by neutral(eps=0.001); conv->y by blend"),
        ("conv->x(a=1)by random( seed=7 )", "conv->x(a=1) by random(seed=7)"),
        ("conv->x by blend(.5)", "conv->x by blend(0.5)"),
        ("conv->x by blend(t=0.5)", None),
        ("conv->x(by=1, start=2) by copy", None),
        ("conv->by by by", None),
        ("conv->auto(x)", None),
        ("conv->auto(linear-mix | pnn, params<=-40%)", None),
        (
            "conv->auto( a( b ) by neutral(.1)|c ,agreement>=98%, macs <= -0.3 ); all-conv->keep",
            "conv->auto(a(b=true) by neutral(0.1) | c, agreement>=0.98, macs<=-30%); all-conv->keep",
        ),
        ("conv->auto(x, latency<=-12.5%, params<=-1%, agreement>=1)", None),
    ],
)
def test_canonical_text(text, canonical):
    parsed = parse(text)
    assert str(parsed) == (canonical or text)
    assert parse(str(parsed)) == parsed
    assert hash(parse(str(parsed))) == hash(parsed)


def test_parse_is_cached():
    assert parse("first-conv->kerv-poly") is parse("first-conv->kerv-poly")


def test_source_takes_no_part_in_equality_hash_or_repr():
    spaced, tight = parse("conv [k=3] -> x"), parse("conv[k=3]->x")
    assert spaced == tight
    assert len({spaced, tight}) == 1
    assert repr(spaced) == repr(tight)
    assert "source" not in repr(spaced)


def test_arguments_alike_to_python_make_different_targets():
    targets = [parse_target(f"x(a={value})") for value in ("1", "1.0", "true")]
    assert [[left == right for right in targets] for left in targets] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    assert len(set(targets)) == 3
    assert targets[0] != "x(a=1)"


def test_objects_are_frozen_and_can_be_copied_and_pickled():
    parsed = parse("conv[name=/a/, k=3]->x(a=1); all-conv->keep")
    assert copy.deepcopy(parsed) == parsed
    assert pickle.loads(pickle.dumps(parsed)) == parsed
    with pytest.raises(AttributeError):
        parsed.rules[0].target.name = "y"


def test_rules_are_a_collection():
    parsed = parse("first-conv->keep; all-conv->x")
    assert len(parsed) == 2
    assert [rule.keeps for rule in parsed] == [True, False]


def test_regex_has_one_spelling_for_a_slash():
    assert Regex("a/b") == Regex(r"a\/b")
    assert str(Regex(r"\\/")) == r"/\\\//"
    assert parse_selector(rf"conv[name={Regex('a/b')}]").tests[0].value == Regex("a/b")


# Errors in a text: the message, the line with the caret, the hint.


@pytest.mark.parametrize(
    ("text", "message", "carets", "hint"),
    [
        ("", "the rule is empty", None, "a rule is written selector->operator"),
        (" ;\n; ", "the rule is empty", "^^", "e.g. first-conv->kerv-poly"),
        ("first-conv", "expected '->' after the selector first-conv, found the end", " " * 10 + "^", "is written"),
        ("conv\n\n", "expected '->' after the selector conv, found the end", "    ^", ""),
        ("conv=>x", "expected '->' after the selector conv, found '='", "    ^", ""),
        ("->x", "expected a selector, found '->'", "^^", ""),
        ("<is_stem>->x", "expected a selector, found '<'", "^", "predicate cannot be read from text"),
        ("conv->", "expected an operator after '->', found the end", "      ^", "or keep"),
        ("conv->3", "expected an operator after '->', found '3'", "      ^", ""),
        ("conv->x y", "expected ';' or the end after a rule, found 'y'", "        ^", "separated by ';'"),
        ("conv->x->y", "expected ';' or the end after a rule, found '->'", "       ^^", ""),
        ("conv->x)", "expected ';' or the end after a rule, found ')'", "       ^", ""),
        ("frist-conv->x", "unknown selector 'frist-conv'", "^" * 10, "did you mean 'first-conv'"),
        ("zzz[kk=3]->x", "unknown selector 'zzz'", "^^^", "known: all-conv, bottleneck"),
        ("conv[]->x", "expected a test such as k=3, found ']'", "     ^", ""),
        ("conv[k=3,]->x", "expected a test such as k=3, found ']'", "         ^", ""),
        ("conv[k=3->x", "'[' is never closed", "    ^", "expected ',' or ']' after k=3"),
        ("conv[k=3; conv->x", "'[' is never closed", "    ^", ""),
        ("conv[k=3", "'[' is never closed", "    ^", ""),
        ("conv[k=3 s=1]->x", "expected ',' or ']' after k=3, found 's'", "         ^", ""),
        ("conv[k=3]]->x", r"expected '->' after the selector conv[k=3], found ']'", "         ^", ""),
        ("conv[kernel=3]->x", "unknown test 'kernel'", "     ^^^^^^", "known: calls, cin"),
        ("conv[grups=3]->x", "unknown test 'grups'", "     ^^^^^", "did you mean 'groups'?"),
        ("conv[k]->x", "expected a comparison after k, found ']'", "      ^", "one of = != >= <= > <"),
        ("conv[k==3]->x", "unknown comparison '=='", "      ^^", "expected one of = != >= <= > <"),
        ("conv[k=foo]->x", "k wants an integer or HxW, e.g. k=3", "       ^^^", "or another key: s, d"),
        ("conv[k=]->x", "k wants an integer or HxW, e.g. k=3", "       ^", ""),
        ("conv[k=", "k wants an integer or HxW, e.g. k=3", "       ^", ""),
        ("conv[k=cin]->x", "k wants an integer or HxW, e.g. k=3", "       ^^^", ""),
        ("conv[cin=3x3]->x", "cin wants an integer, e.g. cin>=64", "         ^^^", "or a range a..b"),
        ("conv[cin=name]->x", "cin wants an integer, e.g. cin>=64", "         ^^^^", ""),
        ("conv[index=-1]->x", "index wants an integer, e.g. index=0..4", "           ^^", ""),
        ("conv[index=/1/]->x", "index wants an integer, e.g. index=0..4", "           ^", ""),
        ("conv[cin=" + "9" * 40 + "]->x", "cin wants an integer", " " * 9 + "^" * 40, ""),
        ("conv[index=4..0]->x", "the range 4..0 is empty", "           ^^^^", "write 0..4"),
        ("conv[index>0..4]->x", "a range cannot be compared by '>'", "          ^", "expected = or !="),
        ("conv[name>=a]->x", "name cannot be compared by '>='", "         ^^", "expected = or !="),
        ("conv[name=]->x", "name wants a glob or a /regex/, e.g. name=layer1.*", "          ^", ""),
        ("conv[in='a']->x", "in wants a glob or a /regex/, e.g. in=Bottleneck", "        ^", ""),
        ("conv[name=/(/]->x", "the regular expression /(/ is not valid: missing )", "          ^^^", ""),
        ("conv[name=/a{" + "9" * 30 + "}/]->x", "is too large for a name", " " * 10 + "^" * 35, ""),
        ("conv[name=//]->x", "a regular expression must not be empty", "          ^^", ""),
        ("conv[name=/a]->x", "'/' opens a regular expression that is never closed", "          ^", r"write '\/'"),
        ("conv[k=3,k=3]->x", "the test k=3 is written twice", "         ^^^", ""),
        ("conv[k=3,k=5]->x", "k=3 and k=5 cannot both hold", "         ^^^", "use a range a..b, or two rules"),
        ("conv->x(a=1", "'(' is never closed", "       ^", "expected ',' or ')' after a"),
        ("conv->x(a=1; conv->y", "'(' is never closed", "       ^", ""),
        ("conv->x(a 1)", "expected ',' or ')' after a, found '1'", "          ^", "is written name=value"),
        ("conv->x(3)", "expected an argument, found '3'", "        ^", "is written name=value, e.g. degree=3"),
        ("conv->x(a=1,)", "expected an argument, found ')'", "            ^", ""),
        ("conv->x(a=1, b=2, a=3)", "the argument 'a' is given twice", "                  ^", ""),
        ("conv->x(a=)", "expected a value for a, found ')'", "          ^", "a number, true, false, none or a word"),
        ("conv->x(a=3x5)", "expected a number, true, false, none or a word, found '3x5'", "          ^^^", ""),
        ("conv->x(a=1e999)", "the number 1e999 is too large", "          ^^^^^", ""),
        ("conv->x(a=" + "9" * 40 + ")", "is too large", " " * 10 + "^" * 40, ""),
        ("conv->x by", "expected a start after 'by', found the end", " " * 10 + "^", "e.g. by neutral(1e-3), by fit"),
        ("conv->x by; conv->y", "expected a start after 'by', found ';'", " " * 10 + "^", ""),
        ("conv->x by 3", "expected a start after 'by', found '3'", " " * 11 + "^", ""),
        ("conv->x by neutral(", "expected the number of the start neutral, found the end", " " * 19 + "^", ""),
        ("conv->x by fit()", "expected the number of the start fit, found ')'", " " * 15 + "^", "by neutral(1e-3)"),
        ("conv->x by neutral(eps=)", "expected the number of the start neutral, found ')'", " " * 23 + "^", ""),
        ("conv->x by neutral(1e-3", "'(' is never closed", " " * 18 + "^", "')' after neutral(1e-3"),
        ("conv->x by neutral(1e-3, 2)", "')' after neutral(1e-3, found ','", " " * 23 + "^", ""),
        (
            "conv->x by neutral(3x5)",
            "expected a number, true, false, none or a word, found '3x5'",
            " " * 19 + "^^^",
            "",
        ),
        ("conv->x by neutral(1e999)", "the number 1e999 is too large", " " * 19 + "^^^^^", ""),
        ("conv->x by copy by fit", "expected ';' or the end after a rule, found 'by'", " " * 16 + "^^", ""),
        ("conv->x by copy fit", "expected ';' or the end after a rule, found 'fit'", " " * 16 + "^^^", ""),
        ("conv->x bye", "expected ';' or the end after a rule, found 'bye'", " " * 8 + "^^^", ""),
        ("conv->x by-copy", "expected ';' or the end after a rule, found 'by-copy'", " " * 8 + "^" * 7, ""),
        ("conv->auto", "expected '(' after auto, found the end", " " * 10 + "^", "e.g. auto(linear-mix | pnn, params"),
        ("conv->auto()", "expected an operator", " " * 11 + "^", ""),
        ("conv->auto(3)", "expected an operator", " " * 11 + "^", ""),
        ("conv->auto(x |)", "expected an operator", " " * 14 + "^", ""),
        ("conv->auto(x", "'(' is never closed", " " * 10 + "^", "expected ',' or ')' after x"),
        ("conv->auto(x; conv->y", "'(' is never closed", " " * 10 + "^", ""),
        (
            "conv->auto(x y)",
            "expected ',' or ')' after x, found 'y'",
            " " * 13 + "^",
            "e.g. auto(linear-mix | pnn, params",
        ),
        ("conv->auto(x, y | z)", "expected a comparison after y, found '|'", " " * 16 + "^", ""),
        ("conv->auto(x, params<=-4% | y)", "')' after params<=-4%, found '|'", " " * 26 + "^", ""),
        ("conv->auto(x | y(b=))", "expected a value for b, found ')'", " " * 19 + "^", ""),
        ("conv->auto(x | y by)", "expected a start after 'by', found ')'", " " * 19 + "^", ""),
        ("conv->auto(keep)", "keep is no operator to choose", " " * 11 + "^^^^", "sites may always stay as they are"),
        ("conv->auto(x | auto(y))", "auto is no operator to choose", " " * 15 + "^" * 4, ""),
        ("conv->auto(x) by fit", "expected ';' or the end after a rule, found 'by'", " " * 14 + "^^", ""),
        ("conv->auto(x, )", "expected a measure, found ')'", " " * 14 + "^", "e.g. auto(linear-mix | pnn, params"),
        ("conv->auto(x, 3)", "expected a measure, found '3'", " " * 14 + "^", ""),
        ("conv->auto(x, params)", "expected a comparison after params, found ')'", " " * 20 + "^", ""),
        ("conv->auto(x, params<=)", "expected a number after params<=, found ')'", " " * 22 + "^", ""),
        ("conv->auto(x, params<=few)", "expected a number after params<=, found 'few'", " " * 22 + "^^^", ""),
        ("conv->auto(x, params<=-4%%)", "')' after params<=-4%, found '%'", " " * 25 + "^", ""),
        ("conv->auto(x, parms<=-4%)", "auto knows no measure 'parms'", " " * 14 + "^" * 5, "did you mean 'params'?"),
        (
            "conv->auto(x, zz<=-4%)",
            "auto knows no measure 'zz'",
            " " * 14 + "^^",
            "known: agreement, latency, macs, params",
        ),
        ("conv->auto(x, params>=-4%)", "params is bounded by '<=', not '>='", " " * 20 + "^^", "e.g. params<=-40%"),
        ("conv->auto(x, macs==-4%)", "macs is bounded by '<=', not '=='", " " * 18 + "^^", "e.g. macs<=-30%"),
        ("conv->auto(x, agreement<=0.9)", "agreement is bounded by '>=', not '<='", " " * 23 + "^^", ""),
        ("conv->auto(x, params<=4%)", "params wants a change below 0 and above -100%", " " * 22 + "^^", "40 % fewer"),
        ("conv->auto(x, latency<=0)", "latency wants a change below 0", " " * 23 + "^", "e.g. latency<=-20%"),
        ("conv->auto(x, macs<=-100%)", "macs wants a change below 0 and above -100%", " " * 20 + "^" * 5, ""),
        (
            "conv->auto(x, agreement>=1.5)",
            "agreement is a share from 0 to 1",
            " " * 25 + "^^^",
            ">=0.98 or agreement>=98%",
        ),
        ("conv->auto(x, agreement>=-1%)", "agreement is a share from 0 to 1", " " * 25 + "^^^", ""),
        ("conv->auto(x, macs<=-4%, macs<=-2%)", "macs is bounded twice", " " * 25 + "^" * 9, ""),
    ],
)
def test_errors_show_the_place(text, message, carets, hint):
    with pytest.raises(RuleError, match=re.escape(message)) as caught:
        parse(text)
    lines = str(caught.value).splitlines()
    assert caught.value.text == text
    if carets is not None:
        assert "  " + carets in lines
    assert hint in caught.value.hint
    assert isinstance(caught.value, ConvSurgeryError)


def test_an_error_in_a_later_line_shows_that_line_alone():
    with pytest.raises(RuleError, match="unknown test 'kk'") as caught:
        parse("first-conv->keep;\n  conv[kk=3]->x;\nall-conv->y")
    assert str(caught.value).splitlines() == [
        "unknown test 'kk'",
        "    conv[kk=3]->x;",
        "         ^^",
        "did you mean 'k'?",
    ]


def test_a_part_alone_must_be_alone():
    with pytest.raises(RuleError, match="expected the end after a selector, found '->'"):
        parse_selector("conv->x")
    with pytest.raises(RuleError, match="expected the end after an operator, found ';'"):
        parse_target("x;")


# Errors of later stages, drawn on the parsed text.


def test_target_error_points_at_the_operator_or_one_argument():
    text = "first-conv->keep; conv[k=3] -> kerv-pol( degree = 3, learnable )"
    target = parse(text).rules[1].target
    for arg, marked in (
        (None, "kerv-pol"),
        ("degree", "degree = 3"),
        ("learnable", "learnable"),
        ("other", "kerv-pol"),
    ):
        error = target.error("no", arg, hint="try this")
        assert text[error.start : error.end] == marked
        assert str(error).endswith("^" * len(marked) + "\ntry this")


def test_selector_rule_and_test_errors_point_at_themselves():
    text = "all-conv->keep;  residual [k=3, s = 1]  -> x(a=1) ;"
    rule = parse(text).rules[1]
    marked = {text[error.start : error.end] for error in (rule.error("no"), rule.selector.error("no"))}
    assert marked == {"residual [k=3, s = 1]  -> x(a=1)", "residual [k=3, s = 1]"}
    error = rule.selector.tests[1].error("no")
    assert text[error.start : error.end] == "s = 1"


def test_errors_of_objects_made_in_python_show_their_canonical_text():
    target = Target("kerv-poly", (("degree", 0), ("balance", 1.0)))
    assert str(target.error("no", "balance")).splitlines() == [
        "no",
        "  kerv-poly(degree=0, balance=1.0)",
        "                      ^^^^^^^^^^^",
    ]
    assert str(Rule(Selector("conv"), Target("x")).error("no")).splitlines() == ["no", "  conv->x", "  ^^^^^^^"]


# Objects made in Python are checked like text.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.Test("kk", "=", 3), "unknown test 'kk'"),
        (lambda: rules.Test("k", "~", 3), "unknown comparison '~'"),
        (lambda: rules.Test("k", "=", -1), "k wants an integer or HxW"),
        (lambda: rules.Test("k", "=", True), "k wants an integer or HxW"),
        (lambda: rules.Test("k", "=", (1, 2, 3)), "k wants an integer or HxW"),
        (lambda: rules.Test("k", "=", Glob("a")), "k wants an integer or HxW"),
        (lambda: rules.Test("name", "=", "a"), "name wants a glob"),
        (lambda: rules.Test("cin", "=", KeyName("nope")), "cin wants an integer"),
        (lambda: rules.Test("index", "=", Range(4, 1)), r"the range 4\.\.1 is empty"),
        (lambda: Glob("a b"), "cannot be written in a rule"),
        (lambda: Regex("a\nb"), "must not be empty or hold a line break"),
        (lambda: Selector("nope"), "unknown selector 'nope'"),
        (lambda: Selector("conv", (rules.Test("s", "=", 1),) * 2), "written twice"),
        (lambda: Target("a b"), "'a b' is not an operator name"),
        (lambda: Target("x", (("a b", 1),)), "'a b' is not an argument name"),
        (lambda: Target("x", (("a", 1), ("a", 2))), "the argument 'a' is given twice"),
        (lambda: Target("x", (("a", "true"),)), r"a rule cannot hold the value of x\(a\)"),
        (lambda: Target("x", (("a", float("nan")),)), r"a rule cannot hold the value of x\(a\)"),
        (lambda: Target("x", (("a", (1, 2)),)), "expected an int, float, bool, None or a word"),
        (lambda: Target("x", (("a", 10**5000),)), r"a rule cannot hold the value of x\(a\)"),
        (lambda: Rules(()), "no rule was given"),
        (lambda: Target("x", (), "a b"), "'a b' is not a start a rule can hold"),
        (lambda: Target("x", (), "neutral(1e-3"), r"'neutral\(1e-3' is not a start a rule can hold"),
        (lambda: Wish("speed", "<=", -0.4), "auto knows no measure 'speed'"),
        (lambda: Wish("params", "<", -0.4), "params is bounded by '<=', not '<'"),
        (lambda: Wish("params", "<=", float("nan")), "params wants a change below 0"),
        (lambda: Wish("agreement", ">=", 98), "agreement is a share from 0 to 1"),
        (lambda: AutoTarget("auto"), "auto needs operators to choose from"),
        (lambda: AutoTarget("auto", options=(Target("keep"),)), "keep is no operator to choose"),
        (
            lambda: AutoTarget("auto", options=(Target("x"),), wishes=(Wish("macs", "<=", -0.4),) * 2),
            "macs is bounded twice",
        ),
    ],
)
def test_objects_are_checked_when_made(make, message):
    with pytest.raises(RuleError, match=message):
        make()


# Matching.


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("first-conv", {"conv1"}),
        ("last-conv", {"head"}),
        ("all-conv", {"conv1", "layer1.0.conv1", "dw", "head"}),
        ("conv", {"conv1", "layer1.0.conv1", "dw", "head"}),
        ("depthwise", {"dw"}),
        ("pointwise", {"head"}),
        ("residual", set()),
        ("conv[k=3]", {"layer1.0.conv1", "dw"}),
        ("conv[k!=3]", {"conv1", "head"}),
        ("conv[k=3..7]", {"conv1", "layer1.0.conv1", "dw"}),
        ("conv[k!=3..7]", {"head"}),
        ("conv[k=s]", {"head"}),
        ("conv[k>s]", {"conv1", "layer1.0.conv1", "dw"}),
        ("conv[s=2, d=1]", {"conv1"}),
        ("conv[groups=cin]", {"dw"}),
        ("conv[cin=cout]", {"layer1.0.conv1", "dw"}),
        ("conv[cin>cout]", {"head"}),
        ("conv[cin<64]", {"conv1"}),
        ("conv[size>=28]", {"conv1", "layer1.0.conv1", "dw", "head"}),
        ("conv[size=28]", {"layer1.0.conv1", "dw", "head"}),
        ("conv[index=1..2]", {"layer1.0.conv1", "dw"}),
        ("conv[index=3]", {"head"}),
        ("conv[calls>1]", {"head"}),
        ("conv[name=layer1.*]", {"layer1.0.conv1"}),
        ("conv[name=*conv1]", {"conv1", "layer1.0.conv1"}),
        ("conv[name=CONV1]", set()),
        ("conv[name=layer[!2]*]", {"layer1.0.conv1"}),
        ("conv[name=/conv/]", {"conv1", "layer1.0.conv1"}),
        ("conv[name=/^conv\\d$/]", {"conv1"}),
        ("conv[name!=/conv/]", {"dw", "head"}),
        ("conv[in=BasicBlock]", {"layer1.0.conv1"}),
        ("conv[in=ResNet]", {"conv1", "layer1.0.conv1"}),
        ("conv[in!=ResNet]", {"dw", "head"}),
    ],
)
def test_what_a_selector_takes(selector, names):
    assert taken(selector) == names


def test_orders_must_hold_for_height_and_width():
    flat = (make_site("flat", k=(1, 7)),)
    for selector, takes in (
        ("conv[k>=3]", False),
        ("conv[k>1]", False),
        ("conv[k<=7]", True),
        ("conv[k<7]", False),
        ("conv[k=1x7]", True),
        ("conv[k=7x1]", False),
        ("conv[k>=1x7]", True),
        ("conv[k=1..7]", True),
        ("conv[k=2..7]", False),
    ):
        assert bool(taken(selector, flat)) is takes, selector


def test_a_shared_module_is_found_by_every_name():
    sites = (make_site(names=("a.conv", "b.conv")),)
    assert taken("conv[name=b.*]", sites) == {"a.conv"}
    assert taken("conv[name!=b.*]", sites) == set()


def test_the_declared_first_convolution_goes_before_the_executed():
    sites = tuple(replace(site, first=site in (BLOCK, DEPTHWISE)) for site in SITES)
    assert taken("first-conv", sites) == {"layer1.0.conv1", "dw"}
    reason = parse_selector("first-conv").reason(STEM, sites)
    assert reason == "not the first convolution (those are dw and layer1.0.conv1)"


def test_a_declared_first_convolution_that_never_runs_is_not_first():
    sites = (replace(UNREACHED, first=True), STEM, BLOCK)
    assert taken("first-conv", sites) == {"conv1"}


@pytest.mark.parametrize(
    ("selector", "site", "reason"),
    [
        ("conv[k=3]", STEM, "k=7, the rule wants k=3"),
        ("conv[k=3, s=1, d=1]", STEM, "k=7, s=2, the rule wants k=3, s=1"),
        ("conv[k>=3, k<=5]", HEAD, "k=1, the rule wants k>=3"),
        ("conv[k=3]", make_site(k=(1, 7)), "k=1x7, the rule wants k=3"),
        ("conv[cin=cout]", STEM, "cin=3, cout=64, the rule wants cin=cout"),
        ("conv[name=layer*]", STEM, "name=conv1, the rule wants name=layer*"),
        ("conv[in=Bottleneck]", BLOCK, "in=BasicBlock|Sequential|ResNet, the rule wants in=Bottleneck"),
        ("conv[in=Bottleneck]", HEAD, "in=(none), the rule wants in=Bottleneck"),
        ("conv[name=x]", make_site(""), "name=(none), the rule wants name=x"),
        ("first-conv", BLOCK, "not the first convolution (that is conv1)"),
        ("last-conv", BLOCK, "not the last convolution (that is head)"),
        ("depthwise", BLOCK, "not depthwise (groups=1, cin=64)"),
        ("pointwise[k=3]", STEM, "not pointwise (k=7)"),
        ("conv-bn", STEM, "conv-bn is a pattern of several layers, not one convolution"),
        ("all-conv", UNREACHED, "no forward call reaches it"),
        ("first-conv", UNREACHED, "no forward call reaches it"),
    ],
)
def test_reasons(selector, site, reason):
    assert parse_selector(selector).reason(site, SITES) == reason


@pytest.mark.parametrize("shape", [None, (3,)])
def test_an_unknown_size_passes_no_test_and_does_not_crash(shape):
    site = make_site(input_shape=shape)
    for test in ("size>=1", "size!=5", "size=0..9", "size=cin", "cin<size"):
        assert not parse_selector(f"conv[{test}]").tests[0].matches(site)
        assert "size=unknown" in (parse_selector(f"conv[{test}]").reason(site, (site,)) or "")


@pytest.mark.parametrize(
    ("selector", "single"),
    [
        ("first-conv", True),
        ("last-conv[k=3]", True),
        ("conv[name=layer1.0.conv1]", True),
        ("conv[index=4]", True),
        ("conv[index=4..4]", True),
        ("all-conv", False),
        ("conv[name=layer1.*]", False),
        ("conv[name=conv?]", False),
        ("conv[name=conv[12]]", False),
        ("conv[name=/conv1/]", False),
        ("conv[name!=conv1]", False),
        ("conv[index=0..4]", False),
        ("conv[index>=4]", False),
        ("conv[index=cin]", False),
        ("conv[k=3]", False),
        ("conv[in=Bottleneck]", False),
    ],
)
def test_singles_out(selector, single):
    assert parse_selector(selector).singles_out is single


# Starts and choices in a rule.


def test_a_rules_start_is_a_text_and_has_a_place():
    text = "first-conv->keep; conv -> kerv-poly( degree = 3 )  by  neutral( 1e-3 )"
    target = parse(text).rules[1].target
    assert (target.name, target.args, target.by) == ("kerv-poly", (("degree", 3),), "neutral(0.001)")
    error = target.error("no", rules.BY)
    assert text[error.start : error.end] == "neutral( 1e-3 )"
    made = Target("kerv-poly", (("degree", 3),), "neutral(0.001)")
    assert made == target
    assert str(made.error("no", rules.BY)).splitlines() == [
        "no",
        "  kerv-poly(degree=3) by neutral(0.001)",
        "                         ^^^^^^^^^^^^^^",
    ]
    assert parse("conv->kerv-poly").rules[0].target.by == ""


def test_targets_with_other_starts_are_other_targets():
    targets = {parse_target(f"x{by}") for by in ("", " by fit", " by neutral", " by neutral(0.1)", " by neutral(.1)")}
    assert len(targets) == 4


def test_auto_is_a_target_with_options_and_wishes():
    target = parse("conv->auto(linear-mix | pnn(fanout=2) by fit, params<=-40%, agreement>=98%)").rules[0].target
    assert isinstance(target, AutoTarget)
    assert target.options == (Target("linear-mix"), Target("pnn", (("fanout", 2),), "fit"))
    assert target.wishes == (Wish("params", "<=", -0.4), Wish("agreement", ">=", 0.98))
    assert (target.args, target.by) == ((), "")
    assert target == AutoTarget("auto", options=target.options, wishes=target.wishes)
    assert as_target(str(target)) == target
    assert parse_target("auto(pnn | linear-mix)") != parse_target("auto(linear-mix | pnn)")


def test_wishes_and_options_know_where_they_were_written():
    text = "first-conv->keep;  conv -> auto( x | y by fit , macs <= -30% )"
    target = parse(text).rules[1].target
    marked = [part.error("no") for part in (target, *target.options, *target.wishes)]
    assert [text[error.start : error.end] for error in marked] == [
        "auto( x | y by fit , macs <= -30% )",
        "x",
        "y",
        "macs <= -30%",
    ]


@pytest.mark.parametrize(
    ("rule", "message", "marked", "hint"),
    [
        ("first-conv->keep by copy; conv->kerv-poly", "what is kept does not start", "copy", ""),
        ("first-conv->kerv-poly by neutrl", "unknown start 'neutrl'", "neutrl", "did you mean 'neutral'?"),
        (
            "first-conv->kerv-l1 by neutral(1e-3)",
            "kerv-l1 has no start 'neutral'",
            "neutral(1e-3)",
            "known: blend, copy, fit, random",
        ),
        ("first-conv->kerv-poly by neutral(2)", "eps must be from 0 to 1, not 2", "neutral(2)", ""),
        ("first-conv->kerv-poly by neutral(seed=2)", "neutral takes only eps", "neutral(seed=2)", ""),
        ("first-conv->kerv-poly by copy(3)", "start copy takes no argument", "copy(3)", ""),
        ("first-conv->kerv-poly by blend(1.5)", "start blend: t must be from 0 to 1, not 1.5", "blend(1.5)", ""),
        ("first-conv->kerv-l1 by fit(0)", "ridge must be above 0 and at most 1, not 0", "fit(0)", ""),
        ("first-conv->kerv-l1 by random(0.5)", "seed must be a whole number", "random(0.5)", ""),
        ("first-conv->kerv-l1 by fit(some)", "start fit: 'some' is not a number", "fit(some)", ""),
        ("first-conv->kerv-gauss(gamma=1) by neutral", "the neutral start chooses gamma itself", "neutral", ""),
        ("pointwise->pnn by neutral(0.5)", "pnn starts by neutral without an eps", "neutral(0.5)", ""),
        ("first-conv->kerv-linear by blend", "kerv-linear has no start 'blend'", "blend", "known: copy, random"),
        (
            "first-conv->auto(kerv-poly)",
            "auto chooses by measurement, which takes a model with weights, and images",
            "auto(kerv-poly)",
            "calibration=images",
        ),
    ],
)
def test_starts_that_cannot_be_are_marked_in_the_rule(rule, message, marked, hint):
    with pytest.raises(RuleError, match=re.escape(message)) as caught:
        cs.plan("resnet18", rule)
    assert rule[caught.value.start : caught.value.end] == marked
    assert caught.value.text == rule
    assert hint in caught.value.hint


@pytest.mark.parametrize("start", ["COPY", "kerv.copy", "my_start"])
def test_starts_that_cannot_be_written_are_marked_too(start):
    rule = f"conv->keep; conv->x by {start}"
    with pytest.raises(RuleError) as caught:
        parse(rule)
    assert caught.value.text == rule
    assert rule[caught.value.start : caught.value.end] == start


@pytest.mark.parametrize("wish", ["agreement>=12.34567891%", "agreement>=0.000001%", "params<=-0.00001%"])
def test_canonical_wishes_can_be_read_again(wish):
    parsed = parse(f"conv->auto(x, {wish})")
    assert parse(str(parsed)) == parsed


def test_a_rules_own_start_goes_before_the_one_for_all():
    rule = "first-conv->kerv-poly by copy; conv[name=layer1.0.conv1]->kerv-sigmoid; last-conv->kerv-l2 by blend(0.5)"
    starts = {e.site.name: str(e.start) for e in cs.plan("resnet18", rule, start="neutral(1e-3)").edits}
    assert starts == {"conv1": "copy", "layer1.0.conv1": "neutral(eps=0.001)", "layer4.1.conv2": "blend(t=0.5)"}
    starts = [str(entry.start) for entry in cs.plan("resnet18", rule).edits]
    assert starts == ["copy", "neutral", "blend(t=0.5)"]


# The registry.


def test_the_registry_names_both_kinds():
    kinds = {place.name: place.kind for place in list_selectors()}
    assert [name for name, kind in kinds.items() if kind == "site"] == [
        "first-conv",
        "last-conv",
        "all-conv",
        "conv",
        "depthwise",
        "pointwise",
    ]
    structures = {name for name, kind in kinds.items() if kind == "structure"}
    assert structures == {"conv-bn", "conv-bn-act", "conv-act", "residual", "depthwise-separable", "bottleneck"}
    for name, kind in kinds.items():
        assert parse_selector(name).structural is (kind == "structure")


def test_a_registered_place_can_be_used_in_rules(monkeypatch):
    monkeypatch.setattr(places, "_PLACES", dict(places._PLACES))
    grouped = SelectorPlace(
        "grouped", "more than one group", match=lambda site, sites: None if site.geometry.groups > 1 else "one group"
    )
    assert register_selector(grouped) is grouped
    assert taken("grouped") == {"dw"}
    assert parse_selector("grouped").reason(STEM, SITES) == "one group"
    with pytest.raises(RuleError, match="the selector 'grouped' is already registered"):
        register_selector(grouped)


def test_what_cannot_be_registered():
    with pytest.raises(RuleError, match="'conv' is already registered"):
        register_selector(SelectorPlace("conv", "", "structure"))
    with pytest.raises(RuleError, match="'two words' is not a name"):
        register_selector(SelectorPlace("two words", "", "structure"))
    with pytest.raises(RuleError, match="'empty' names sites but has no match function"):
        register_selector(SelectorPlace("empty", ""))


# Rules from Python values.


@dataclass(frozen=True)
class Config:
    degree: int = 3

    def to_target(self):
        return Target("kerv-poly", (("degree", self.degree),))


class Broken:
    def to_target(self):
        return "kerv-poly"


def is_stem(site):
    return site.name == "conv1"


def test_as_rules_leaves_rules_alone():
    parsed = parse("first-conv->x")
    assert as_rules(parsed) is parsed
    assert as_rules(parsed.rules[0]) == parsed
    assert as_rules("first-conv->x") is parsed


def test_as_rules_reads_a_mixed_sequence_in_order():
    value = [
        "first-conv->keep; conv[k=1]->shift",
        parse("last-conv->keep").rules[0],
        ("conv[k=3]", Config(5)),
        (Selector("all-conv"), Target("x")),
    ]
    assert str(as_rules(value)) == (
        "first-conv->keep; conv[k=1]->shift; last-conv->keep; conv[k=3]->kerv-poly(degree=5); all-conv->x"
    )
    assert as_rules(tuple(value)) == as_rules(value) == parse(str(as_rules(value)))


def test_a_predicate_selects():
    (rule,) = as_rules([(is_stem, "keep")])
    assert rule.selector == PredicateSelector(is_stem)
    assert str(rule) == "<is_stem>->keep"
    assert [site.name for site in SITES if rule.selector.reason(site, SITES) is None] == ["conv1"]
    assert rule.selector.reason(BLOCK, SITES) == "<is_stem> declines it"
    assert rule.selector.reason(UNREACHED, SITES) == "no forward call reaches it"
    assert not rule.selector.structural
    assert not rule.selector.singles_out
    assert str(rule.selector.error("no")).splitlines() == ["no", "  <is_stem>", "  ^^^^^^^^^"]
    assert str(PredicateSelector(lambda site: True)) == "<lambda>"


def test_a_config_and_its_text_are_the_same_target():
    assert as_target(Config(3)) == as_target("kerv-poly(degree=3)") == as_target(Target("kerv-poly", (("degree", 3),)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "rules are a text, a Rule or a sequence of them, not a value of type int"),
        (b"conv->x", "not a value of type bytes"),
        ([], "no rule was given"),
        ([3], "a rule is a text, a Rule or a pair"),
        ((is_stem, "keep"), r"a single pair goes into a list: \[\(selector, target\)\]"),
        (
            [(3, "keep")],
            "a selector is a text, a Selector, a function on sites or an nn.Module to look for, not a value of",
        ),
        ([(Config, "keep")], "not the class Config"),
        ([("conv", 3)], "a target is a text, a Target or an operator's config, not a value of type int"),
        ([("conv", Config)], r"not the class Config\nwrite Config\(\)"),
        ([("conv", Broken())], r"Broken\.to_target\(\) gave a value of type str, not a Target"),
        ([("conv->x", "keep")], "expected the end after a selector, found '->'"),
    ],
)
def test_as_rules_says_what_it_takes(value, message):
    with pytest.raises(RuleError, match=message):
        as_rules(value)


# The package.


def test_rules_import_no_torch():
    code = "import sys, convsurgery.rules; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_is_complete():
    assert all(hasattr(rules, name) for name in rules.__all__)
    assert len(set(rules.__all__)) == len(rules.__all__)
