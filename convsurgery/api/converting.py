"""Converting a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from convsurgery import zoo
from convsurgery.adapt.auto import auto_rule
from convsurgery.adapt.calibration import fits_of, run_fits
from convsurgery.adapt.fitting import FitOptions, LayerFit
from convsurgery.adapt.images import Images, calibration_images
from convsurgery.api.choosing import MOST, auto
from convsurgery.api.planning import Inputs, look
from convsurgery.errors import ConversionError
from convsurgery.operators import Start
from convsurgery.rules import RulesLike, as_rules
from convsurgery.surgery import Plan, apply, apply_, record
from convsurgery.surgery.record import set_record

__all__ = ["convert", "convert_"]


def convert(
    model: nn.Module,
    rule: RulesLike,
    *,
    example_inputs: Inputs = None,
    start: str | Start | None = None,
    calibration: Any = None,
    on_layer: Callable[[LayerFit], object] | None = None,
) -> nn.Module:
    """A copy of ``model`` with the convolutions that ``rule`` takes replaced; the model itself stays as it is.

    The copy keeps class, API, dtype, device, train flag and ``requires_grad``; by default it still predicts what the
    model predicted, where the operator has a neutral setting.

    Args:
        model, rule, example_inputs, start: as for :func:`plan`.
        calibration: images, as for :func:`calibrate`. Operators are fitted to the convolutions' outputs as far as they
            can be. A rule with ``auto(...)`` needs them.
        on_layer: called with a :class:`LayerFit` for every layer that was fitted.

    Raises:
        As :func:`plan`; ConversionError also when a weight is not finite, or when every site the rule takes has to be
        skipped.

    Example:
        >>> import timm, torch, convsurgery as cs
        >>> model = timm.create_model("resnet18").eval()
        >>> new, x = cs.convert(model, "all-conv->kerv-linear"), torch.randn(1, 3, 64, 64)
        >>> torch.equal(new(x), model(x))
        True
    """
    made, trial = _trial(model, rule, example_inputs, start, calibration, on_layer)
    return _of_known_weights(apply(model, made) if trial is None else trial, made)


def convert_(
    model: nn.Module,
    rule: RulesLike,
    *,
    example_inputs: Inputs = None,
    start: str | Start | None = None,
    calibration: Any = None,
    on_layer: Callable[[LayerFit], object] | None = None,
) -> nn.Module:
    """As :func:`convert`, in place: ``model`` itself is changed and returned; on an error it is as it was.

    The Parameter objects are kept, so that an optimiser made before goes on to work. A model that *is* a Conv2d cannot
    become another class: use the return value.
    """
    # What is fitted or chosen is on a copy, so that data that fails leaves the model as it was.
    made, trial = _trial(model, rule, example_inputs, start, calibration, on_layer)
    new = _of_known_weights(apply_(model, made), made)
    if trial is None:
        return new
    fits = fits_of(made.edits)
    theirs = dict(trial.named_modules(remove_duplicate=False))
    for name, fit in fits.items():
        new.get_submodule(name).load_state_dict(theirs[name].state_dict())
        if fit.batchnorm:
            norm = new.get_submodule(fit.batchnorm)
            norm.load_state_dict(theirs[fit.batchnorm].state_dict())
            norm.eps = theirs[fit.batchnorm].eps
    done, its = record(new), record(trial)
    assert done is not None
    assert its is not None
    set_record(new, dataclasses.replace(done, norms=its.norms))
    return new


def _of_known_weights(new: nn.Module, made: Plan) -> nn.Module:
    """``new``, which remembers where its weights came from, if anybody knows."""
    if made.weights and not made.weights.startswith("unknown"):
        zoo.note_origin(new, zoo.Origin.parse(made.weights))
    return new


def _trial(
    model: nn.Module,
    rule: RulesLike,
    example_inputs: Inputs,
    start: str | Start | None,
    calibration: Any,
    on_layer: Callable[[LayerFit], object] | None,
) -> tuple[Plan, nn.Module | None]:
    """The plan to carry out, and a converted copy of ``model`` where something had to be fitted or chosen."""
    rules = as_rules(rule)
    if calibration is not None and auto_rule(rules) is not None:
        # Who said how many images to use has said it.
        most = None if isinstance(calibration, Images) else MOST
        result = auto(model, rules, calibration, images=most, example_inputs=example_inputs, start=start)
        for layer in result.calibration.layers if result.calibration is not None and on_layer is not None else ():
            on_layer(layer)  # type: ignore[misc]
        return result.plan, result.model
    made = look(model, example_inputs).plan(rules, start, data=calibration is not None)
    if made.skips and not made.edits:
        reasons = "\n".join(f"  {entry.site.label}: {entry.reason}" for entry in made.skips[:8])
        if not all(entry.reason == "kept" for entry in made.skips):
            raise ConversionError(f"every convolution that {made.rule} takes has to stay:\n{reasons}")
    if calibration is None:
        _needs_no_data(made)
        return made, None
    fits = fits_of(made.edits)
    if not fits:
        return made, None
    trial = apply(model, made)
    run_fits(
        trial, model, fits, calibration_images(calibration, model), FitOptions(), progress=False, on_layer=on_layer
    )
    return made, trial


def _needs_no_data(made: Plan) -> None:
    """Raise for operators that were asked to start by fit where there is nothing to fit to."""
    entry = next((e for e in made.edits if e.start is not None and e.start.name == "fit"), None)
    if entry is None or entry.config is None:
        return
    names = [name for name in entry.config.starts if name != "fit"]
    without = [name for name in names if entry.config.refuses_start(name, entry.site) is None]
    raise ConversionError(
        f"{entry.site.label}: {entry.config} starts by fit, which needs images: give calibration=images. "
        f"Without data it starts by {' or '.join(without)}"
    )
