"""Choosing operators from a scan: the optimum, what is said where there is none, and the curve of choices."""

from __future__ import annotations

import itertools
import math
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import needs

from convsurgery.adapt.choose import Choice, Pick, Point, backed_off, choose, draw_trade_off, trade_off
from convsurgery.errors import ArgumentError, ConversionError, ConvSurgeryError, RuleError, StorageError
from convsurgery.rules import Wish, parse

METRICS = ("params", "macs", "latency")


@dataclass(frozen=True)
class Row:
    """What a scan's row has, as far as choosing reads it."""

    site: str
    index: int
    operator: str
    start: str = "fit"
    error: float | None = 0.1
    kl: float | None = 0.01
    agreement: float | None = 0.99
    params_saved: int | None = 0
    macs_saved: int | None = 0
    latency_saved: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Scan:
    rows: tuple[Row, ...]
    model: str = "net"
    params_total: int = 1000
    macs_total: int = 10000
    forward_ms: float | None = None
    images: int = 100
    seen: str = "fx"


def unmeasured(site: str, index: int, operator: str, reason: str) -> Row:
    return Row(site, index, operator, "", None, None, None, None, None, None, reason)


def random_scan(seed: int, sites: int = 5, operators: int = 2) -> Scan:
    draw = np.random.default_rng(seed)
    rows = [
        Row(
            f"layer{site}.conv",
            site,
            ("linear-mix", "kerv-poly(degree=2)", "pnn")[operator],
            "fit",
            0.1,
            float(10 ** draw.uniform(-4, 0)),
            1 - int(draw.integers(0, 10)) / 100,
            int(draw.integers(-40, 200)),
            int(draw.integers(-400, 2000)),
            float(draw.uniform(-0.2, 1)),
        )
        for site in range(sites)
        for operator in range(operators)
    ]
    return Scan(tuple(rows), forward_ms=5.0)


def assignments(scan: Scan) -> list[list[Row]]:
    groups = [[None, *group] for _, group in itertools.groupby(scan.rows, key=lambda row: row.site)]
    return [[row for row in rows if row is not None] for rows in itertools.product(*groups)]


def totals(scan: Scan, rows: list[Row]) -> dict[str, float]:
    return {
        "params": -sum(row.params_saved for row in rows) / scan.params_total,
        "macs": -sum(row.macs_saved for row in rows) / scan.macs_total,
        "latency": -sum(row.latency_saved for row in rows) / scan.forward_ms,
        "agreement": 1 - sum(1 - row.agreement for row in rows),
        "kl": sum(row.kl for row in rows),
    }


def holds(total: dict[str, float], wishes: list[Wish], slack: float = 1e-9) -> bool:
    signs = {"<=": 1, ">=": -1}
    return all(signs[wish.op] * (total[wish.metric] - wish.value) <= slack for wish in wishes)


def picked_rows(scan: Scan, choice: Choice) -> list[Row]:
    known = {(row.site, row.operator, row.start): row for row in scan.rows}
    return [known[pick.site, pick.operator, pick.start] for pick in choice.picks]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_optimum_is_that_of_all_assignments(seed: int, count: int) -> None:
    scan = random_scan(seed)
    every = [totals(scan, rows) for rows in assignments(scan)]
    # What one of the assignments saves, so that it can be met, sometimes exactly.
    able = [total for total in every if all(total[metric] < -0.02 for metric in METRICS[:count])]
    middle = able[len(able) // 2]
    wishes = [Wish(metric, "<=", middle[metric]) for metric in METRICS[:count]]
    choice = choose(scan, wishes)
    assert len({pick.site for pick in choice.picks}) == len(choice.picks)
    assert not choice.notes
    found = totals(scan, picked_rows(scan, choice))
    assert holds(found, wishes)
    assert found["kl"] == pytest.approx(min(total["kl"] for total in every if holds(total, wishes)), rel=1e-6)
    for metric, value in found.items():
        assert getattr(choice.predicted, metric) == pytest.approx(max(0.0, value) if metric == "agreement" else value)


@pytest.mark.parametrize("seed", range(6))
def test_optimum_within_an_agreement(seed: int) -> None:
    scan = random_scan(seed)
    every = [totals(scan, rows) for rows in assignments(scan)]
    saving = Wish("params", "<=", 0.6 * min(total["params"] for total in every))
    best = max(total["agreement"] for total in every if holds(total, [saving]))
    wishes = [saving, Wish("agreement", ">=", best)]
    choice = choose(scan, wishes)
    found = totals(scan, picked_rows(scan, choice))
    assert holds(found, wishes)
    assert not choice.notes
    assert found["kl"] == pytest.approx(min(total["kl"] for total in every if holds(total, wishes)), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_agreement_alone_saves_most(seed: int) -> None:
    scan = random_scan(seed)
    wish = Wish("agreement", ">=", 0.9)
    found = totals(scan, picked_rows(scan, choose(scan, "agreement>=0.9")))
    every = [totals(scan, rows) for rows in assignments(scan)]
    assert holds(found, [wish])
    assert found["params"] == pytest.approx(min(total["params"] for total in every if holds(total, [wish])))


def test_agreement_alone_saves_macs_where_no_parameters_can_be_saved() -> None:
    rows = [Row("a", 0, "pnn", macs_saved=10), Row("a", 0, "lbc", macs_saved=20), Row("b", 1, "pnn", agreement=0.5)]
    assert [pick.operator for pick in choose(Scan(tuple(rows)), "agreement>=0.9").picks] == ["lbc"]
    nothing = choose(Scan((Row("a", 0, "pnn"),)), "agreement>=0.9")
    assert not nothing.picks
    assert "saves parameters or MACs" in nothing.notes[0]
    assert all(rule.keeps for rule in parse(nothing.rule))


def test_agreement_that_adds_up_to_too_much_is_noted() -> None:
    rows = [Row(name, index, "pnn", agreement=0.97, params_saved=300) for index, name in enumerate("ab")]
    choice = choose(Scan(tuple(rows)), "params<=-50%, agreement>=0.95")
    assert [pick.site for pick in choice.picks] == ["a", "b"]
    (note,) = choice.notes
    assert "agreement>=0.95" in note
    assert "0.9400" in note
    assert not choose(Scan(tuple(rows)), "params<=-50%, agreement>=0.94").notes


def test_among_equals_more_parameters_are_saved() -> None:
    rows = [
        Row("a", 0, "pnn", params_saved=100, macs_saved=5000),
        Row("a", 0, "lbc", params_saved=101, macs_saved=5000),
    ]
    for order in (rows, rows[::-1]):
        assert choose(Scan(tuple(order)), "macs<=-40%").picks[0].operator == "lbc"


def test_unmeasured_and_broken_rows_are_never_chosen() -> None:
    rows = (
        unmeasured("a", 0, "pnn", "grouped"),
        Row("a", 0, "lbc", kl=math.inf, params_saved=900),
        Row("b", 1, "pnn", params_saved=400),
    )
    assert [pick.site for pick in choose(Scan(rows), "params<=-40%").picks] == ["b"]
    with pytest.raises(ConversionError, match=r"a: pnn: grouped; lbc: the predictions are not finite"):
        choose(Scan(rows), "params<=-50%")


def test_excluded_sites_and_operators_stay_out() -> None:
    rows = (
        Row("a", 0, "pnn", kl=0.001, params_saved=400),
        Row("a", 0, "lbc", kl=0.1, params_saved=400),
        Row("b", 1, "pnn", kl=1.0, params_saved=400),
    )
    scan = Scan(rows)
    assert [(pick.site, pick.operator) for pick in choose(scan, "params<=-40%").picks] == [("a", "pnn")]
    without = choose(scan, "params<=-40%", exclude=[("a", "pnn")])
    assert [(pick.site, pick.operator) for pick in without.picks] == [("a", "lbc")]
    assert [pick.site for pick in choose(scan, "params<=-40%", exclude=["a"]).picks] == ["b"]
    with pytest.raises(ConversionError, match=r"-40 % is the most; wanted -60 %(?s:.*)a: excluded"):
        choose(scan, "params<=-60%", exclude=["a"])
    with pytest.raises(ArgumentError, match="no site 'c'"):
        choose(scan, "params<=-40%", exclude=["c"])
    with pytest.raises(ArgumentError, match="'lbc'"):
        choose(scan, "params<=-40%", exclude=[("b", "lbc")])
    with pytest.raises(ArgumentError, match="sequence"):
        choose(scan, "params<=-40%", exclude="a")


def test_unreachable_names_the_most_and_what_stands_against_it() -> None:
    rows = [
        Row("small", 0, "pnn", params_saved=34),
        Row("small", 0, "lbc", params_saved=20),
        Row("other", 1, "pnn", params_saved=200),
        unmeasured("big", 2, "pnn", "it is grouped"),
        unmeasured("big", 2, "lbc", "it is grouped"),
        unmeasured("", 3, "pnn", "it is blocked"),
        Row("", 3, "lbc", params_saved=-5),
        *[unmeasured(f"more{number}", 4 + number, "pnn", "too small") for number in range(5)],
    ]
    scan = Scan(tuple(rows))
    with pytest.raises(ConversionError) as caught:
        choose(scan, "params<=-40%, agreement>=0.9", sizes={"": 100, "big": 400, "small": 40, "more4": 7})
    lines = str(caught.value).splitlines()
    assert "params<=-40%, agreement>=0.9" in lines[0]
    assert lines[1:6] == [
        "params: -23.4 % is the most; wanted -40 %",
        "what stands against it:",
        "  big, 40 % of the parameters: pnn, lbc: it is grouped",
        "  (the model itself), 10 % of the parameters: pnn: it is blocked; lbc: saves no params",
        "  more4, 0.7 % of the parameters: pnn: too small",
    ]
    assert "more0" in lines[6]
    assert "… and 2 more" in lines[8]
    assert "small" not in str(caught.value).replace("too small", "").replace("a smaller", "")
    assert choose(scan, "params<=-23.4%").predicted.params == pytest.approx(-0.234)


def test_savings_that_exclude_each_other() -> None:
    rows = (
        Row("a", 0, "pnn", params_saved=500, macs_saved=-100),
        Row("a", 0, "lbc", params_saved=100, macs_saved=5000),
    )
    with pytest.raises(ConversionError) as caught:
        choose(Scan(rows), "params<=-40%, macs<=-40%, agreement>=0.5")
    assert "params: -50 % is the most; wanted -40 %; -10 % is the most where the other savings hold" in str(
        caught.value
    )
    assert "macs: -50 % is the most; wanted -40 %; 1 % is the most" in str(caught.value)


def test_latency_has_to_be_measured() -> None:
    with pytest.raises(ConversionError, match="did not measure latency"):
        choose(Scan((Row("a", 0, "pnn", params_saved=500),)), "latency<=-10%")
    with pytest.raises(ConversionError, match="did not measure latency"):
        trade_off(Scan((Row("a", 0, "pnn", params_saved=500),)), metric="latency")
    timed = Scan((Row("a", 0, "pnn", latency_saved=1.0), Row("b", 1, "pnn", kl=0.0)), forward_ms=4.0)
    assert choose(timed, "latency<=-25%").predicted.latency == pytest.approx(-0.25)
    assert trade_off(timed, metric="latency")[-1].predicted.latency == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("budget", "message", "caret"),
    [
        ("params<=40%", "a change below 0", 8),
        (" parms<=-40%", "knows no measure 'parms'", 1),
        ("params<=-40%,", "found the end", 13),
        ("params<=-40% macs<=-10%", "expected ','", 13),
        ("params<=-40%, params<=-10%", "bounded twice", 14),
        ("params<=-40%); conv->keep", "holds no '\\)'", 12),
    ],
)
def test_budget_errors_show_the_budget(budget: str, message: str, caret: int) -> None:
    with pytest.raises(RuleError, match=message) as caught:
        choose(random_scan(0), budget)
    assert caught.value.text == budget
    assert caught.value.start == caret
    assert "auto(" not in str(caught.value)


def test_budget_without_wishes() -> None:
    for budget in ("", " ", ()):
        with pytest.raises(ArgumentError, match=r"params<=-40%, agreement>=0\.98"):
            choose(random_scan(0), budget)
    with pytest.raises(ArgumentError, match="twice"):
        choose(random_scan(0), [Wish("params", "<=", -0.1), Wish("params", "<=", -0.2)])
    with pytest.raises(ArgumentError, match="float"):
        choose(random_scan(0), [0.4])


def test_text_and_wishes_choose_alike() -> None:
    scan = random_scan(1)
    wishes = [Wish("params", "<=", -0.2), Wish("agreement", ">=", 0.8)]
    choice = choose(scan, "params<=-20%, agreement>=80%")
    assert choice == choose(scan, wishes)
    assert choice == choose(replace(scan, rows=scan.rows[::-1]), wishes)
    assert choice.wishes == tuple(wishes)


def test_rounding_of_the_solver_breaks_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.optimize

    scan, milp, calls = random_scan(0), scipy.optimize.milp, []
    right = choose(scan, "params<=-20%")

    def careless(*args: object, **kwargs: object) -> object:
        found = milp(*args, **kwargs)
        calls.append(len(kwargs["constraints"]))
        if len(calls) == 1:
            found.x = np.zeros_like(found.x)
        return found

    monkeypatch.setattr(scipy.optimize, "milp", careless)
    assert choose(scan, "params<=-20%") == right
    assert calls == [2, 3]


def test_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConvSurgeryError, match="pip install scipy"):
        choose(random_scan(0), "params<=-5%")


@pytest.mark.parametrize("name", ["layer1.0.conv1", "", "a b", "x/y", "f(x)$", "odd*", "q[0]", "two\nlines", "ü.c-1"])
def test_rule_names_its_site_alone(name: str) -> None:
    pick = Pick(name, "kerv-poly(degree=2)", "neutral(eps=0.001)")
    (rule,) = parse(pick.rule)
    assert str(rule) == pick.rule
    (test,) = rule.selector.tests
    assert test.key == "name"
    assert test.value.matches(name)
    assert not any(test.value.matches(other) for other in (f"{name}x", f"x{name}", f"{name}\n", "oddly", "q0"))
    assert (rule.target.by, str(rule.target)) == ("neutral(eps=0.001)", "kerv-poly(degree=2) by neutral(eps=0.001)")


def test_rule_of_a_choice() -> None:
    rows = (Row("layer1.0.conv1", 0, "linear-mix", params_saved=300), Row("stem", 1, "pnn", "", params_saved=300))
    choice = choose(Scan(rows), "params<=-50%")
    assert choice.rule == "conv[name=layer1.0.conv1]->linear-mix by fit; conv[name=stem]->pnn"
    assert str(parse(choice.rule)) == choice.rule
    assert all(rule.selector.singles_out for rule in parse(choice.rule))


def test_text_of_a_choice() -> None:
    rows = (
        Row(
            "stages.0.blocks.0.a_rather_long_name.conv_dw", 0, "kerv-gauss(gamma=0.5, learnable=true)", params_saved=300
        ),
        Row("", 1, "pnn", kl=0.25, params_saved=125, macs_saved=-20),
    )
    lines = str(choose(Scan(rows), "params<=-42%, agreement>=0.99")).splitlines()
    assert max(map(len, lines)) <= 80
    assert "2 convolutions are replaced" in lines[0]
    assert any(line.split()[:3] == ["(the", "model", "itself)"] and "-12.5 %" in line for line in lines)
    assert any(line.split() == ["parameters", "-42.5", "%", "<=", "-42", "%"] for line in lines)
    assert any(line.split() == ["agreement", "98", "%", ">=", "99", "%"] for line in lines)
    assert not any(line.startswith("latency") for line in lines)
    assert "is not predicted together" in " ".join(lines)


def test_backed_off_gives_the_most_harmful_back() -> None:
    rows = tuple(
        Row(name, index, "pnn", kl=kl, params_saved=saved)
        for index, (name, kl, saved) in enumerate([("a", 0.1, 400), ("b", 0.05, 50), ("c", 0.01, 300), ("", 0.09, 100)])
    )
    scan = Scan(rows)
    choice = choose(scan, "params<=-85%")
    assert len(choice.picks) == 4
    smaller = backed_off(scan, choice, keep=None)
    assert smaller is not None
    assert [pick.site for pick in smaller.picks] == ["a", "c", ""]  # 1e-3 nats for each thousandth of b
    assert any("given back" in note and note.endswith(" b") for note in smaller.notes)
    assert any("params<=-85% is no longer predicted" in note and "-80 %" in note for note in smaller.notes)
    assert smaller.predicted.params == pytest.approx(-0.8)
    assert smaller.predicted.kl == pytest.approx(0.2)
    one = backed_off(scan, choice, keep=1)
    assert one is not None
    assert [pick.site for pick in one.picks] == ["c"]
    assert any("b, (the model itself), a" in note for note in one.notes)
    sizes = [4]
    left: Choice | None = choice
    while (left := backed_off(scan, left)) is not None:
        sizes.append(len(left.picks))
    assert sizes == [4, 3, 2, 1]


def test_backed_off_refuses_what_cannot_be() -> None:
    scan = random_scan(0)
    choice = choose(scan, "params<=-20%")
    for keep in (-1, len(choice.picks)):
        with pytest.raises(ArgumentError, match="gives nothing back"):
            backed_off(scan, choice, keep=keep)
    assert backed_off(scan, choice, keep=0) is None
    with pytest.raises(ConversionError, match="not of this scan"):
        backed_off(scan, replace(choice, picks=(Pick("x", "pnn", "fit"), *choice.picks)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_trade_off_rises_along_the_optimal_curve(seed: int, metric: str) -> None:
    scan = random_scan(seed)
    curve = trade_off(scan, metric=metric, points=7)
    every = [totals(scan, rows) for rows in assignments(scan)]
    savings = [-getattr(choice.predicted, metric) for choice in curve]
    damages = [choice.predicted.kl for choice in curve]
    assert 3 <= len(curve) <= 7
    assert all(before < after for before, after in itertools.pairwise(savings))
    assert all(before <= after for before, after in itertools.pairwise(damages))
    assert savings[-1] == pytest.approx(-min(total[metric] for total in every))
    for saving, kl in zip(savings, damages, strict=True):
        assert kl == pytest.approx(min(total["kl"] for total in every if -total[metric] >= saving - 1e-9), rel=1e-6)


def test_trade_off_without_a_curve() -> None:
    assert trade_off(Scan((Row("a", 0, "pnn", params_saved=-1),))) == ()
    assert len(trade_off(Scan((Row("a", 0, "pnn", params_saved=10),)), points=5)) == 1
    with pytest.raises(ArgumentError, match="'params'"):
        trade_off(random_scan(0), metric="parms")
    with pytest.raises(ArgumentError, match="points=1"):
        trade_off(random_scan(0), points=1)


def test_drawing_of_a_trade_off(tmp_path: Path) -> None:
    needs("matplotlib", "docs")
    points = [Point(0.4, 0.9, 0.87, "best & $x$"), Point(0.1, 1.0), Point(0.25, 0.98, 0.97, "middle")]
    path = tmp_path / "new" / "curve.svg"
    draw_trade_off(points, path)
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    text = path.read_text(encoding="utf-8")
    assert "best &amp; $x$" in text
    assert "stroke-dasharray" in text
    dots = [use for group in root.iter() if group.get("id") == "dots" for use in group.iter() if "use" in use.tag]
    assert len(dots) == 2
    assert list(path.parent.iterdir()) == [path]
    draw_trade_off(points, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text(encoding="utf-8") == text


def test_drawing_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        draw_trade_off([], tmp_path / "x.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConvSurgeryError, match="pip install matplotlib"):
        draw_trade_off([Point(0.1, 1.0)], tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())


def test_drawing_where_nothing_can_be_written(tmp_path: Path) -> None:
    needs("matplotlib", "docs")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        draw_trade_off([Point(0.1, 1.0)], tmp_path / "file" / "x.svg")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
