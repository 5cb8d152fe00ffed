"""From a scan to operators: which convolutions to replace by what, so that a budget is met with the least damage.

A scan measures every replacement alone. Here damages are taken to add up over the sites, which makes the choice an
integer linear program. What they really sum to is for a measurement of the converted model to say; where it says too
much, :func:`backed_off` gives some convolutions back.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from convsurgery.adapt.choose_report import Choice, Pick, Point, Prediction, change, draw_trade_off, unreachable_text
from convsurgery.errors import ArgumentError, ConversionError, ConvSurgeryError, RuleError, nearest
from convsurgery.rules import Wish, parse

if TYPE_CHECKING:
    from convsurgery.adapt.scan import Scan, ScanRow

__all__ = ["Choice", "Pick", "Point", "Prediction", "backed_off", "choose", "draw_trade_off", "trade_off"]

_SAVINGS: Final = ("params", "macs", "latency")
_EXAMPLE: Final = "e.g. params<=-40%, agreement>=0.98"
_BEFORE: Final = "conv->auto(conv, "
#: a saving or a loss this much off a bound is rounding: sums of many shares
_ROUNDING: Final = 1e-9


@dataclass(frozen=True)
class _Option:
    """A measured row, in shares of the whole model."""

    row: ScanRow
    saved: Mapping[str, float]
    kl: float
    lost: float | None

    @property
    def pick(self) -> Pick:
        return Pick(self.row.site, self.row.operator, self.row.start, _predict([self]))


def _options(scan: Scan, exclude: Collection[str | tuple[str, str]] = ()) -> list[_Option]:
    rows = [row for row in scan.rows if row.site not in exclude and (row.site, row.operator) not in exclude]
    options = []
    for row in rows:
        if row.reason is not None or row.kl is None or not math.isfinite(row.kl):
            continue
        assert row.params_saved is not None
        assert row.macs_saved is not None
        saved = {
            "params": row.params_saved / max(1, scan.params_total),
            "macs": row.macs_saved / max(1, scan.macs_total),
        }
        if scan.forward_ms and row.latency_saved is not None:
            saved["latency"] = row.latency_saved / scan.forward_ms
        # A KL of nothing comes out a rounding below 0.
        lost = None if row.agreement is None else 1 - row.agreement
        options.append(_Option(row, saved, max(0.0, row.kl), lost))
    return sorted(options, key=lambda option: (option.row.index, option.row.site))


def _predict(options: Iterable[_Option]) -> Prediction:
    options = list(options)
    timed = all("latency" in option.saved for option in options)
    sums = {
        metric: -math.fsum(option.saved[metric] for option in options) + 0.0
        for metric in _SAVINGS
        if metric != "latency" or timed
    }
    lost = [option.lost for option in options if option.lost is not None]
    agreement = max(0.0, 1 - math.fsum(lost)) if len(lost) == len(options) else None
    kl = math.fsum(option.kl for option in options)
    return Prediction(sums["params"], sums["macs"], sums.get("latency"), agreement, kl)


def _made(options: Iterable[_Option], wishes: tuple[Wish, ...], notes: tuple[str, ...] = ()) -> Choice:
    options = list(options)
    return Choice(tuple(option.pick for option in options), wishes, _predict(options), notes)


def _read_budget(budget: str | Sequence[Wish]) -> tuple[Wish, ...]:
    if isinstance(budget, str):
        wishes = _parse_budget(budget) if budget.strip() else ()
    else:
        wishes = tuple(budget)
        for number, wish in enumerate(wishes):
            if not isinstance(wish, Wish):
                raise ArgumentError("budget", f"a budget is a text or wishes, not {type(wish).__name__}", _EXAMPLE)
            if wish.metric in [other.metric for other in wishes[:number]]:
                raise ArgumentError("budget", f"{wish.metric} is bounded twice in the budget", _EXAMPLE)
    if not wishes:
        raise ArgumentError("budget", "the budget holds no wish: nothing would say what to choose", _EXAMPLE)
    return wishes


def _parse_budget(text: str) -> tuple[Wish, ...]:
    # What would end the parentheses it is put into.
    stray = re.search(r"->|[;()|]", text)
    if stray:
        raise RuleError(f"a budget holds no {stray[0]!r}", text, stray.start(), stray.end(), _EXAMPLE)
    try:
        (rule,) = parse(f"{_BEFORE}{text})").rules
    except RuleError as error:
        start, end, message = error.start - len(_BEFORE), error.end - len(_BEFORE), error.message
        if start >= len(text):
            start, message = len(text.rstrip()), message.replace("found ')'", "found the end")
            end = start + 1
        message = message.replace("',' or ')'", "','")
        hint = _EXAMPLE if error.hint.startswith("e.g. auto(") else error.hint
        raise RuleError(message, text, start, end, hint) from None
    # Without the source, whose text the user never wrote.
    return tuple(Wish(wish.metric, wish.op, wish.value) for wish in getattr(rule.target, "wishes", ()))


def _excluded(scan: Scan, exclude: Iterable[str | tuple[str, str]]) -> tuple[str | tuple[str, str], ...]:
    if isinstance(exclude, str):
        raise ArgumentError("exclude", "exclude is a sequence of names", f"e.g. exclude=[{exclude!r}]")
    entries = tuple(exclude)
    sites, pairs = {row.site for row in scan.rows}, {(row.site, row.operator) for row in scan.rows}
    for entry in entries:
        if isinstance(entry, str) and entry not in sites:
            raise ArgumentError("exclude", f"the scan has no site {entry!r} to exclude", nearest(entry, sites))
        if not isinstance(entry, str) and entry not in pairs:
            hint = "a site's name, or a pair of a site's name and an operator of the scan"
            raise ArgumentError("exclude", f"the scan has no {entry!r} to exclude", hint)
    return entries


_Bound = tuple[Sequence[float], float]


def _solve(
    options: Sequence[_Option], cost: Sequence[float], bonus: Sequence[float], bounds: Sequence[_Bound]
) -> list[_Option] | None:
    """At most one option for each site with the least sum of ``cost``, among equals with the largest of ``bonus``.

    A bound is a number for each option and the least sum of it. None when the bounds cannot hold together.
    """
    if not options:
        return None if any(least > _ROUNDING for _, least in bounds) else []
    try:
        optimize: Any = importlib.import_module("scipy.optimize")
    except ImportError as error:
        raise ConvSurgeryError("operators are chosen by scipy: pip install scipy") from error
    import numpy as np

    def scaled(values: Sequence[float]) -> Any:
        return np.asarray(values) / (max(map(abs, values)) or 1)

    # The solver takes 1e-6 for nothing, in the objective as in the constraints.
    objective = 1e3 * (scaled(cost) - 1e-7 * scaled(bonus))
    names = list(dict.fromkeys(option.row.site for option in options))
    one = np.array([[option.row.site == name for option in options] for name in names], float)
    limits = [optimize.LinearConstraint(one, -np.inf, 1)]
    for values, least in bounds:
        limits.append(optimize.LinearConstraint(1e3 * np.asarray(values)[None], 1e3 * (least - _ROUNDING), np.inf))
    while True:
        found = optimize.milp(
            objective,
            constraints=limits,
            integrality=np.ones(len(options)),
            bounds=optimize.Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        if found.status == 2:
            return None
        if found.x is None:
            raise ConvSurgeryError(f"scipy could not choose among {len(options)} replacements: {found.message}")
        taken = found.x > 0.5
        if all(np.asarray(values)[taken].sum() >= least - 2 * _ROUNDING for values, least in bounds):
            return [option for option, take in zip(options, taken, strict=True) if take]
        # Rounding to whole numbers broke a bound: the same once more, without this assignment.
        limits.append(optimize.LinearConstraint(np.where(taken, 1.0, -1.0)[None], -np.inf, taken.sum() - 1))


def _least_kl(options: Sequence[_Option], bounds: Sequence[_Bound], prefer: str = "params") -> list[_Option] | None:
    return _solve(options, [option.kl for option in options], [option.saved[prefer] for option in options], bounds)


def _saving(options: Sequence[_Option], metric: str) -> list[float]:
    return [option.saved[metric] for option in options]


def _most(options: Iterable[_Option], metric: str) -> float:
    """The largest saving there is: at every site what saves most."""
    best: dict[str, float] = {}
    for option in options:
        best[option.row.site] = max(best.get(option.row.site, 0.0), option.saved[metric])
    return math.fsum(best.values())


def _timed(scan: Scan, options: list[_Option]) -> list[_Option]:
    """The options with a latency."""
    timed = [option for option in options if "latency" in option.saved]
    if not scan.forward_ms or (options and not timed):
        raise ConversionError("the scan did not measure latency\nscan with latency=True, or bound params or macs")
    return timed


def choose(
    scan: Scan,
    budget: str | Sequence[Wish],
    *,
    exclude: Iterable[str | tuple[str, str]] = (),
    sizes: Mapping[str, int] | None = None,
) -> Choice:
    """The replacements that meet a budget with the least predicted damage.

    With savings wished for, the sum of the KL divergences is least, within the wished agreement where that is possible
    at all. With only agreement wished for, the saved parameters are most, or the saved MACs where no operator saves
    parameters.

    Args:
        scan: what every replacement does alone.
        budget: ``"params<=-40%, agreement>=0.98"``, or the wishes.
        exclude: names of sites that stay, or pairs (site, operator) not to be chosen.
        sizes: parameters of the convolutions by the sites' names, for the error of a budget out of reach.

    Raises:
        RuleError: for a budget that cannot be read.
        ArgumentError: for a budget without wishes, or something to exclude that the scan does not have.
        ConversionError: for savings out of reach, with the most there is; for a latency or an agreement that was not
            measured.
        ConvSurgeryError: where scipy is not installed.
    """
    wishes = _read_budget(budget)
    exclude = _excluded(scan, exclude)
    savings = [wish for wish in wishes if wish.metric != "agreement"]
    floor = next((wish for wish in wishes if wish.metric == "agreement"), None)
    options = _options(scan, exclude)
    if any(wish.metric == "latency" for wish in savings):
        options = _timed(scan, options)
    # What saves nothing that counts would only be luggage.
    count = {"params", *(wish.metric for wish in savings)} if savings else {_counted(options)}
    options = [option for option in options if any(option.saved[metric] > 0 for metric in count)]
    kept: list[_Bound] = []
    if floor is not None:
        if any(option.lost is None for option in options):
            why = "; ".join(note for note in scan.notes if note.startswith("agreement"))
            raise ConversionError(f"{floor} cannot be chosen for: the scan holds no agreement\n{why}".rstrip())
        kept = [([-(option.lost or 0.0) for option in options], floor.value - 1)]
    if not savings:
        (metric,) = count
        gain = _saving(options, metric)
        best = _solve(options, [-saved for saved in gain], [-option.kl for option in options], kept) or []
        notes = () if options else ("no operator of the scan saves parameters or MACs",)
        return _made(best, wishes, notes)
    most = {wish.metric: _most(options, wish.metric) for wish in savings}
    bounds: list[_Bound] = [(_saving(options, wish.metric), -wish.value) for wish in savings]
    if any(most[wish.metric] < -wish.value - _ROUNDING for wish in savings):
        raise ConversionError(unreachable_text(scan, wishes, most, {}, exclude, sizes))
    picked = _least_kl(options, bounds + kept)
    if picked is not None:
        return _made(picked, wishes)
    picked = _least_kl(options, bounds) if kept else None
    if picked is None:
        raise ConversionError(
            unreachable_text(scan, wishes, most, _most_together(options, savings, bounds), exclude, sizes)
        )
    agreement = _predict(picked).agreement
    note = (
        f"{floor} is not predicted together with these savings: single losses sum up to an agreement of "
        f"{agreement:.4f}. They need not add up; the converted model has to be measured."
    )
    return _made(picked, wishes, (note,))


def _counted(options: Sequence[_Option]) -> str:
    """What to save where no saving was wished for."""
    return "params" if any(option.saved["params"] > 0 for option in options) else "macs"


def _most_together(
    options: Sequence[_Option], savings: Sequence[Wish], bounds: Sequence[_Bound]
) -> dict[str, float | None]:
    """The largest saving of each measure where the wishes for the others hold; None where those alone cannot."""
    together: dict[str, float | None] = {}
    for number, wish in enumerate(savings):
        others = [bound for other, bound in enumerate(bounds) if other != number]
        gain = _saving(options, wish.metric)
        best = _solve(options, [-saved for saved in gain], [0.0] * len(options), others)
        together[wish.metric] = None if best is None else math.fsum(option.saved[wish.metric] for option in best)
    return together


def backed_off(scan: Scan, choice: Choice, *, keep: int | None = None) -> Choice | None:
    """The next choice to try when a measurement found more damage than wished for.

    The picks with the most KL for what they save become convolutions again.

    Args:
        keep: how many picks stay; three quarters by default, and at least one fewer than before.

    Returns:
        The smaller choice, whose notes say what was given back; None when nothing would be left.

    Raises:
        ArgumentError: for ``keep`` below 0 or not below the number of picks.
        ConversionError: for a choice that was not made from this scan.
    """
    count = len(choice.picks)
    if keep is None:
        keep = count - max(1, round(count / 4))
    elif not 0 <= keep < max(1, count):
        raise ArgumentError("keep", f"keep={keep} gives nothing back of {count} picks", f"expected 0 to {count - 1}")
    if keep <= 0:
        return None
    known = {(option.row.site, option.row.operator, option.row.start): option for option in _options(scan)}
    try:
        options = [known[pick.site, pick.operator, pick.start] for pick in choice.picks]
    except KeyError as error:
        raise ConversionError(f"the choice is not of this scan, which did not measure {error.args[0]}") from None
    savings = [wish for wish in choice.wishes if wish.metric != "agreement"]
    # In units of what was wished for, so that several measures can be summed.
    weights = {wish.metric: -1 / wish.value for wish in savings} or {_counted(options): 1.0}

    def damage(option: _Option) -> tuple[float, float]:
        gain = sum(weight * option.saved.get(metric, 0.0) for metric, weight in weights.items())
        return (option.kl / gain if gain > 0 else math.inf, option.kl)

    # Of equals those executed first go, whatever the order of the picks.
    worst = sorted(options, key=lambda option: (-damage(option)[0], -damage(option)[1], option.row.index))
    back = worst[: count - keep]
    smaller = _made([option for option in options if option not in back], choice.wishes, choice.notes)
    labels = ", ".join(option.row.site or "(the model itself)" for option in back)
    notes = [*choice.notes, f"given back to the convolution: {labels}"]
    for wish in savings:
        reached = getattr(smaller.predicted, wish.metric)
        if reached is not None and reached > wish.value + _ROUNDING:
            notes.append(f"{wish} is no longer predicted: {wish.metric} {change(reached)}")
    return replace(smaller, notes=tuple(notes))


def trade_off(scan: Scan, *, metric: str = "params", points: int = 8) -> tuple[Choice, ...]:
    """Choices from the smallest saving to the largest there is, each with the least KL for its saving.

    Args:
        metric: "params", "macs" or "latency".
        points: at how many savings, evenly spaced, to look; equal choices are given once, so there may be fewer.

    Returns:
        Choices without wishes; savings rise from one to the next, and KL never falls. Empty where nothing saves.

    Raises:
        ArgumentError: for an unknown measure, or fewer than 2 points.
        ConversionError: for a latency that was not measured.
        ConvSurgeryError: where scipy is not installed.
    """
    if metric not in _SAVINGS:
        raise ArgumentError("metric", f"no saving is called {metric!r}", nearest(metric, _SAVINGS))
    if points < 2:
        raise ArgumentError("points", f"points={points} makes no curve", "expected 2 or more")
    options = _options(scan)
    if metric == "latency":
        options = _timed(scan, options)
    options = [option for option in options if option.saved[metric] > 0]
    if not options:
        return ()
    gain = _saving(options, metric)
    least, most = min(gain), _most(options, metric)
    curve: list[Choice] = []
    reached = 0.0
    for number in range(points):
        wanted = least + (most - least) * number / (points - 1)
        # The choice before saves that much already, so it is the best here too.
        if wanted <= reached + _ROUNDING:
            continue
        picked = _least_kl(options, [(gain, wanted)], metric)
        if picked is None:  # the largest saving, missed by rounding
            continue
        reached = math.fsum(option.saved[metric] for option in picked)
        curve.append(_made(picked, ()))
    return tuple(curve)
