"""Converting a model."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from convsurgery import zoo
from convsurgery.adapt.auto import auto_rule
from convsurgery.adapt.calibration import fits_of, run_fits
from convsurgery.adapt.fitting import FitOptions, LayerFit
from convsurgery.adapt.images import Images, calibration_images
from convsurgery.api.choosing import MOST, auto
from convsurgery.api.planning import Inputs, inputs_for, look
from convsurgery.errors import ConversionError, warn
from convsurgery.operators import Start
from convsurgery.rules import RulesLike, as_rules
from convsurgery.surgery import Plan, apply, apply_, record
from convsurgery.surgery.apply import Undo
from convsurgery.surgery.record import set_record

__all__ = ["convert", "convert_"]


@torch.inference_mode(False)
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
    inputs = inputs_for(model, example_inputs)
    return _of_known_weights(apply(model, made, example_inputs=inputs) if trial is None else trial, made)


@torch.inference_mode(False)
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

    The Parameter objects that stay are the very ones; operators with weights of their own (pnn, lbc, linear-mix, what
    is learnable) bring new ones, which an optimiser made before does not know: a warning says so. A model that *is* a
    Conv2d cannot become another class: use the return value.
    """
    # What is fitted or chosen is on a copy, so that data that fails leaves the model as it was.
    made, trial = _trial(model, rule, example_inputs, start, calibration, on_layer)
    inputs = inputs_for(model, example_inputs)
    before = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = list(model.parameters())
    new = apply_(model, made, example_inputs=inputs, then=None if trial is None else partial(_take_fits, made, trial))
    _tell_optimisers(before, kept, new)
    return _of_known_weights(new, made)


def _tell_optimisers(before: dict[int, str], kept: list[nn.Parameter], new: nn.Module) -> None:
    """Warn where an optimiser made before trains what is no longer in the model, or does not know what is new in it."""
    now = {id(parameter): name for name, parameter in new.named_parameters()}
    gone = [parameter for parameter in kept if id(parameter) not in now]
    fresh = [name for key, name in now.items() if key not in before]
    if not gone and not fresh:
        return
    # A group of an optimiser is a dictionary with a list of Parameters; nothing else tells of optimisers.
    lists = [held for held in gc.get_referrers(*kept) if type(held) is list and held is not kept and held is not gone]
    groups = [item for item in gc.get_referrers(*lists) if type(item) is dict and "lr" in item] if lists else []
    known = {id(parameter) for group in groups for parameter in group.get("params", ())}
    unknown = [name for name in fresh if id(new.get_parameter(name)) not in known]
    if groups and (unknown or gone):
        what = f"new: {', '.join(unknown[:3])}" if unknown else f"gone: {before[id(gone[0])]}"
        warn(
            f"an optimiser made before the conversion does not have the model's parameters any more ({what}): "
            "make it anew, or add_param_group"
        )


def _take_fits(made: Plan, trial: nn.Module, new: nn.Module, undo: Undo) -> None:
    """What was fitted in a trial, into the model that was converted alike."""
    theirs = dict(trial.named_modules(remove_duplicate=False))
    for name, fit in fits_of(made.edits).items():
        new.get_submodule(name).load_state_dict(theirs[name].state_dict())
        if fit.batchnorm:
            norm = new.get_submodule(fit.batchnorm)
            kept = {key: value.clone() for key, value in norm.state_dict().items()}
            undo += [partial(norm.load_state_dict, kept), partial(setattr, norm, "eps", norm.eps)]
            norm.load_state_dict(theirs[fit.batchnorm].state_dict())
            norm.eps = theirs[fit.batchnorm].eps
    done, its = record(new), record(trial)
    assert done is not None
    assert its is not None
    set_record(new, dataclasses.replace(done, norms=its.norms))


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
    trial = apply(model, made, example_inputs=inputs_for(model, example_inputs))
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
