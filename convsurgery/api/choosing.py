"""Choosing what to replace, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import nn

from convsurgery.adapt.auto import Attempt, AutoResult, auto_rule, choose_and_convert, measured_points
from convsurgery.adapt.choose import Choice, Point
from convsurgery.adapt.footing import warn_of_random
from convsurgery.adapt.images import calibration_images
from convsurgery.api.planning import Inputs, look
from convsurgery.errors import RuleError
from convsurgery.operators import Start
from convsurgery.rules import RulesLike, as_rules

__all__ = ["MOST", "auto", "measure_choices"]

#: images that are used where nothing else is said: activations of all of them are kept
MOST = 512


def auto(
    model: nn.Module,
    rule: RulesLike,
    data: Any,
    *,
    images: int | None = MOST,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    example_inputs: Inputs = None,
    start: str | Start | None = None,
    on_attempt: Callable[[Attempt], object] | None = None,
) -> AutoResult:
    """Replace what can be replaced at the least damage: ``"conv->auto(linear-mix | pnn, params<=-40%)"``.

    Scans every operator at every site on one part of the images, solves for the replacements that meet the wishes with
    the least damage, converts a copy, calibrates it, and measures the whole on the other part: a quarter, and at least
    128 images where there are as many. While the agreement wished for is not shown, the replacements with the most
    damage for what they save are given back; a saving that is missed for it is reported in the plan's notes and by a
    warning. An agreement is shown when the lower end of its 95 % interval (Clopper, Pearson 1934) reaches it: 183
    images have to be held out for 0.98, and all of them answered as before.

    :func:`convert` with ``calibration=`` does this for such rules and returns the model alone.

    Args:
        model: a classifier; not changed.
        rule: rules of which one has the target ``auto(operators, wishes)``. Wishes are ``params``, ``macs`` and
            ``latency`` as changes of the whole model (``params<=-40%``), and ``agreement>=0.98`` with its answers.
        data: images, as for :func:`calibrate`; at least 8, better some hundreds.
        images: how many to use at most: of a folder, data set or tensor a part drawn from the whole, evenly over
            folders or classes; of a loader or another iterable the first ones.
        seed: of the draw.
        groups: for each image what it belongs to, such as the picture it was cropped from; what belongs together is
            either fitted to or measured on. Where files are known, crops are told by their names.
        example_inputs, start: as for :func:`plan`.
        on_attempt: called with every choice that was carried out and measured.

    Raises:
        RuleError: for rules without ``auto(...)``.
        ConversionError: for savings out of reach, with the most there is and what stands against it; when nothing
            keeps the agreement.
        DataError: as :func:`calibrate`; for images that are too few to show the agreement wished for, with the number
            that is needed; and where the model answers all of them with one class, with which to agree says nothing.
    """
    rules = as_rules(rule)
    if auto_rule(rules) is None:
        raise RuleError(
            "no rule has the target auto(...)", str(rules), hint="e.g. conv->auto(linear-mix, params<=-40%)"
        )
    view = look(model, example_inputs)
    begin = None if start is None else Start.parse(start)
    source = calibration_images(data, model, images=images, seed=seed)
    return choose_and_convert(
        model,
        rules,
        source,
        view.seen,
        label=view.label,
        params=view.params,
        weights=str(view.weights),
        start=begin,
        groups=groups,
        on_attempt=on_attempt,
    )


def measure_choices(
    model: nn.Module,
    choices: Sequence[Choice],
    data: Any,
    *,
    images: int | None = MOST,
    seed: int = 0,
    metric: str = "params",
) -> list[Point]:
    """Carry out each choice and measure its agreement on held-out images: the points of a Pareto curve.

    Args:
        model: the original; not changed.
        choices: of :func:`trade_off`, or others.
        data, images, seed: as for :func:`auto`.
        metric: the saving: "params", "macs" or "latency".

    Returns:
        For each choice the saving, the agreement that the scan predicts and the one measured;
        :func:`draw_trade_off` draws them.
    """
    warn_of_random(model=model)
    source = calibration_images(data, model, images=images, seed=seed)
    return measured_points(model, choices, source, look(model).seen, metric=metric)
