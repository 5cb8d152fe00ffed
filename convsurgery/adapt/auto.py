"""Choosing by measurement: scan, choose under a budget, convert, calibrate, measure together, back off."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convsurgery.adapt.bounds import clopper_pearson, images_needed
from convsurgery.adapt.calibration import Calibration, fits_of, run_fits
from convsurgery.adapt.choose import Choice, Point, backed_off, choose
from convsurgery.adapt.choose_report import change
from convsurgery.adapt.fitting import FitOptions
from convsurgery.adapt.footing import one_class
from convsurgery.adapt.holdout import FITTED, Holdout, hold_out
from convsurgery.adapt.images import Images
from convsurgery.adapt.losses import logits_of
from convsurgery.adapt.running import eval_mode
from convsurgery.adapt.scan import Scan, scan
from convsurgery.adapt.timing import milliseconds
from convsurgery.errors import ConversionError, DataError, warn
from convsurgery.graph import Observation
from convsurgery.operators import Start
from convsurgery.rules import AutoTarget, Rule, Rules, Wish, parse
from convsurgery.surgery import Plan, apply, make_plan, record, weights_of
from convsurgery.surgery.record import set_record

__all__ = ["Attempt", "AutoResult", "auto_rule", "choose_and_convert", "measured_points"]

#: held-out images below which an agreement says little
_FEW = 32


@dataclass(frozen=True)
class Attempt:
    """A choice carried out, and what it does as a whole on held-out images.

    Attributes:
        choice: what was replaced by what.
        params, macs, latency: relative changes, such as -0.41; latency None where it was not wished for.
        agreement: share of held-out images whose top-1 class is the original's.
        images: how many these were.
    """

    choice: Choice
    params: float
    macs: float
    latency: float | None
    agreement: float
    images: int = 1

    @property
    def bounds(self) -> tuple[float, float]:
        """The 95 % interval of Clopper and Pearson for the agreement on all images."""
        return clopper_pearson(round(self.agreement * self.images), self.images)

    def holds(self, wish: Wish) -> bool:
        """Whether what was promised is so: of the agreement the lower bound has to be."""
        value = self.bounds[0] if wish.metric == "agreement" else getattr(self, wish.metric)
        return value is not None and (value >= wish.value if wish.op == ">=" else value <= wish.value)


@dataclass(frozen=True)
class AutoResult:
    """A converted model that was chosen by measurement.

    Attributes:
        model: converted and calibrated.
        plan: what was done; its notes say what was given up.
        scan: what every replacement does alone.
        attempts: all choices that were tried; the last one stands.
        calibration: of the last one.
        held_out: images that the agreement was measured on.
        data: which images were used in all, such as "512 of 1,347 images, seed 0".
    """

    model: nn.Module
    plan: Plan
    scan: Scan
    attempts: tuple[Attempt, ...]
    calibration: Calibration | None
    held_out: int
    data: str = ""

    @property
    def rule(self) -> str:
        """The rules that do the same without measuring."""
        return self.plan.rule

    def __str__(self) -> str:
        lines = [
            f"tried {len(self.attempts)} choice{'s' * (len(self.attempts) > 1)} on {self.held_out} held-out images:"
        ]
        for number, attempt in enumerate(self.attempts, 1):
            lines.append(
                f"  {number}. {len(attempt.choice.picks)} sites: parameters {change(attempt.params)}, "
                f"MACs {change(attempt.macs)}, agreement {_bounded(attempt)}"
            )
        told = [f"images: {self.data}"] * bool(self.data) + [f"weights: {self.plan.weights}"] * bool(self.plan.weights)
        return "\n".join([*lines, *self.plan.notes, *told])


def auto_rule(rules: Rules) -> Rule | None:
    """The rule whose target is ``auto(...)``, if there is one; RuleError for two."""
    found = [rule for rule in rules if isinstance(rule.target, AutoTarget)]
    if len(found) > 1:
        raise found[1].target.error("one rule may say auto(...)", hint="name all operators in one, behind one selector")
    return found[0] if found else None


def choose_and_convert(
    model: nn.Module,
    rules: Rules,
    images: Images,
    seen: Observation,
    *,
    label: str,
    params: int,
    weights: str = "",
    start: Start | None = None,
    groups: Sequence[Hashable] | None = None,
    on_attempt: Callable[[Attempt], object] | None = None,
) -> AutoResult:
    """Carry out rules of which one is ``auto(...)``.

    Scans the operators on one part of the images, chooses the replacements that meet the wishes with the least damage,
    converts a copy, calibrates it, and measures on the other part; while the lower bound of the agreement misses the
    one wished for, the worst quarter of the replacements is given back.

    Raises:
        ConversionError: for savings out of reach even with every replacement, or an agreement that no replacement at
            all keeps.
        DataError: for too few images, also to show the agreement that is wished for, and where the model answers all
            of them with one class.
    """
    rule = auto_rule(rules)
    assert rule is not None
    target = rule.target
    assert isinstance(target, AutoTarget)
    floor = next((wish for wish in target.wishes if wish.metric == "agreement"), None)
    needed = 0 if floor is None else images_needed(floor.value)
    parts = hold_out(images, images.sources if groups is None else groups, needed or 0)
    count = parts.count
    if floor is not None and (needed is None or needed > count):
        raise DataError(_cannot_be_shown(floor, needed, parts))
    reference = _answers(model, parts.held_out, weights)
    if count < _FEW:
        warn(f"only {count} held-out images: an agreement measured on them says little")
    taken = _taken_before(rules, rule, seen, label, params, start)
    timed = any(wish.metric == "latency" for wish in target.wishes)
    options = [str(option) for option in target.options]
    found = scan(model, options, parts.fit, where=str(rule.selector), start=start, images=None, latency=timed)
    known = {row.site for row in found.rows}
    sizes = {site.name: site.cost.params for site in seen.sites}
    choice: Choice | None = choose(found, target.wishes or _ANY, exclude=sorted(taken & known), sizes=sizes)
    attempts: list[Attempt] = []
    while choice is not None and choice.picks:
        plan = make_plan(label, params, seen, _with(rules, rule, choice), start, data=True)
        plan = dataclasses.replace(plan, weights=weights)
        new = apply(model, plan)
        fits = fits_of(plan.edits)
        calibration = run_fits(new, model, fits, parts.fit, FitOptions(), progress=False) if fits else None
        attempts.append(_measure(new, model, plan, choice, parts.held_out, reference, timed))
        if on_attempt is not None:
            on_attempt(attempts[-1])
        missed = [wish for wish in target.wishes if not attempts[-1].holds(wish)]
        if not any(wish.metric == "agreement" for wish in missed):
            plan = _noted(new, plan, attempts, missed, parts)
            return AutoResult(new, plan, found, tuple(attempts), calibration, count, str(images))
        choice = backed_off(found, choice)
    raise ConversionError(_nothing_left(target.wishes, floor, attempts))


def _cannot_be_shown(floor: Wish, needed: int | None, parts: Holdout) -> str:
    """Why so few images cannot show an agreement, and what could."""
    count = parts.count
    best = clopper_pearson(count, count)[0]
    if needed is None:
        return f"{floor} is shown by no number of images, only by all there are: ask for less, such as agreement>=0.99"
    return (
        f"{floor} cannot be shown on {count} held-out images of {parts.total}: were all of them answered as before, it "
        f"would be {best:.4f} by the 95 % bound of Clopper and Pearson. It takes {needed:,} held-out images, so "
        f"{needed + FITTED:,} in all; or ask for agreement>={math.floor(best * 1000) / 1000:g}"
    )


#: where nothing is wished for, answers are to stay
_ANY = (Wish("agreement", ">=", 0.99),)


def _taken_before(
    rules: Rules, rule: Rule, seen: Observation, label: str, params: int, start: Start | None
) -> set[str]:
    """Sites that rules before the one with auto take or shield."""
    before = tuple(each for each in rules.rules[: rules.rules.index(rule)])
    if not before:
        return set()
    plan = make_plan(label, params, seen, Rules(before), start, data=True)
    return {entry.site.name for entry in plan.entries if entry.rule is not None}


def _with(rules: Rules, rule: Rule, choice: Choice) -> Rules:
    """The rules with the choice in the place of ``auto(...)``; the sites it leaves are kept."""
    picked = (*parse(choice.rule).rules, Rule(rule.selector, parse("all-conv->keep").rules[0].target))
    at = rules.rules.index(rule)
    return Rules((*rules.rules[:at], *picked, *rules.rules[at + 1 :]))


def _answers(model: nn.Module, images: Iterable[Tensor], weights: str | None = None) -> list[Tensor]:
    """Top-1 classes, batch by batch; with ``weights`` as of a reference, which has to know more than one class."""
    with eval_mode(model), torch.no_grad():
        answers = [logits_of(model(batch)).argmax(1) for batch in images]
    refused = None if weights is None else one_class(torch.cat(answers).bincount())
    if refused is not None:
        known = f" (weights: {weights})" * bool(weights)
        raise DataError(
            f"no agreement can be promised: {refused.removeprefix('n/a: ')}{known}. Load trained weights, give images "
            "of several classes prepared as in training, or choose by scan and choose, without agreement"
        )
    return answers


def _measure(
    new: nn.Module,
    model: nn.Module,
    plan: Plan,
    choice: Choice,
    images: Iterable[Tensor],
    reference: Sequence[Tensor],
    timed: bool,
) -> Attempt:
    answers = _answers(new, images)
    same = sum(int((a == b).sum()) for a, b in zip(answers, reference, strict=True))
    count = sum(len(answer) for answer in reference)
    before, after = plan.before, plan.after
    latency = None
    if timed:
        batch = next(iter(images))
        with eval_mode(new, model), torch.no_grad():
            old_ms, new_ms = milliseconds(lambda: model(batch), lambda: new(batch))
        latency = new_ms / old_ms - 1
    return Attempt(
        choice,
        (after.params - before.params) / max(1, plan.total_params),
        (after.macs - before.macs) / max(1, before.macs),
        latency,
        same / count,
        count,
    )


def _noted(new: nn.Module, plan: Plan, attempts: Sequence[Attempt], missed: Sequence[Wish], parts: Holdout) -> Plan:
    """The plan with what was reached and given up, in the model's record too."""
    last = attempts[-1]
    files = ""
    if parts.files is not None:
        files = f"; crops of one file stay on one side, and count as independent: {parts.files:,} files in all"
    notes = [
        f"auto: {len(last.choice.picks)} sites, parameters {change(last.params)}, MACs {change(last.macs)}, "
        f"agreement {_bounded(last)} on {parts.count} held-out images, after {len(attempts)} attempts{files}"
    ]
    notes += [f"auto: gave up {wish}: {_reached(last, wish)} was reached" for wish in missed]
    plan = dataclasses.replace(plan, notes=(*plan.notes, *notes))
    done = record(new)
    if done is not None:
        set_record(new, dataclasses.replace(done, plans=(*done.plans[:-1], plan)))
    if missed:
        warn("; ".join(notes[1:]))
    return plan


def _bounded(attempt: Attempt) -> str:
    low, high = attempt.bounds
    return f"{attempt.agreement:.4f} (95 % interval {low:.4f} to {high:.4f})"


def _reached(attempt: Attempt, wish: Wish) -> str:
    value = getattr(attempt, wish.metric)
    return f"{value:.4f}" if wish.metric == "agreement" else f"{wish.metric} {change(value)}"


def _nothing_left(wishes: Sequence[Wish], floor: Wish | None, attempts: Sequence[Attempt]) -> str:
    wanted = ", ".join(map(str, wishes))
    if not attempts:
        return f"no replacement meets {wanted}: nothing that saves anything is predicted to keep that agreement"
    best = max(attempts, key=lambda attempt: attempt.agreement)
    text = (
        f"no replacement meets {wanted}: the best of {len(attempts)} choices, {len(best.choice.picks)} sites with "
        f"parameters {change(best.params)}, agrees on {_bounded(best)} of {best.images} held-out images. "
    )
    if floor is not None and best.agreement >= floor.value:
        more = images_needed(floor.value, best.agreement)
        if more is not None:
            text += f"On about {more:,} held-out images the same share would show it. "
    return text + "Fine-tune after converting by a rule of your own, take other operators, or ask for less"


def measured_points(
    model: nn.Module, choices: Sequence[Choice], images: Images, seen: Observation, *, metric: str = "params"
) -> list[Point]:
    """Each choice carried out and measured on held-out images, for a curve of saving against agreement."""
    parts = hold_out(images, images.sources)
    reference = _answers(model, parts.held_out, str(weights_of(model)))
    points = []
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for choice in choices:
        plan = make_plan("", params, seen, parse(choice.rule), None, data=True)
        new = apply(model, plan)
        if fits := fits_of(plan.edits):
            run_fits(new, model, fits, parts.fit, FitOptions(), progress=False)
        attempt = _measure(new, model, plan, choice, parts.held_out, reference, metric == "latency")
        saving = -(getattr(attempt, metric) or 0.0)
        points.append(Point(saving, choice.predicted.agreement, attempt.agreement, f"{len(choice.picks)} sites"))
    return points
