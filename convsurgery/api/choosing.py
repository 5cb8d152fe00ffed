"""Choosing what to replace, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from convsurgery.adapt.auto import Attempt, AutoResult, auto_rule, choose_and_convert, measured_points
from convsurgery.adapt.choose import Choice, Point
from convsurgery.adapt.images import calibration_images
from convsurgery.api.planning import Inputs, look
from convsurgery.errors import RuleError
from convsurgery.operators import Start
from convsurgery.rules import RulesLike, as_rules

__all__ = ["auto", "measure_choices"]


def auto(
    model: nn.Module,
    rule: RulesLike,
    data: Any,
    *,
    images: int | None = 512,
    example_inputs: Inputs = None,
    start: str | Start | None = None,
    on_attempt: Callable[[Attempt], object] | None = None,
) -> AutoResult:
    """Replace what can be replaced at the least damage: ``"conv->auto(linear-mix | pnn, params<=-40%)"``.

    Scans every operator at every site on three quarters of the images, solves for the replacements that meet the
    wishes with the least damage, converts a copy, calibrates it, and measures the whole on the last quarter. While the
    agreement wished for is missed, the replacements with the most damage for what they save are given back; a saving
    that is missed for it is reported in the plan's notes and by a warning.

    :func:`convert` with ``calibration=`` does this for such rules and returns the model alone.

    Args:
        model: a classifier; not changed.
        rule: rules of which one has the target ``auto(operators, wishes)``. Wishes are ``params``, ``macs`` and
            ``latency`` as changes of the whole model (``params<=-40%``), and ``agreement>=0.98`` with its answers.
        data: images, as for :func:`calibrate`; at least 8, better some hundreds.
        images: how many to use at most.
        example_inputs, start: as for :func:`plan`.
        on_attempt: called with every choice that was carried out and measured.

    Raises:
        RuleError: for rules without ``auto(...)``.
        ConversionError: for savings out of reach, with the most there is and what stands against it; when nothing
            keeps the agreement.
        DataError: as :func:`calibrate`, and for too few images.
    """
    rules = as_rules(rule)
    if auto_rule(rules) is None:
        raise RuleError(
            "no rule has the target auto(...)", str(rules), hint="e.g. conv->auto(linear-mix, params<=-40%)"
        )
    view = look(model, example_inputs)
    begin = None if start is None else Start.parse(start)
    source = calibration_images(data, model, images=images)
    return choose_and_convert(
        model, rules, source, view.seen, label=view.label, params=view.params, start=begin, on_attempt=on_attempt
    )


def measure_choices(
    model: nn.Module, choices: Sequence[Choice], data: Any, *, images: int | None = 512, metric: str = "params"
) -> list[Point]:
    """Carry out each choice and measure its agreement on held-out images: the points of a Pareto curve.

    Args:
        model: the original; not changed.
        choices: of :func:`trade_off`, or others.
        data, images: as for :func:`auto`.
        metric: the saving: "params", "macs" or "latency".

    Returns:
        For each choice the saving, the agreement that the scan predicts and the one measured;
        :func:`draw_trade_off` draws them.
    """
    source = calibration_images(data, model, images=images)
    return measured_points(model, choices, source, look(model).seen, metric=metric)
