"""Blends from a convolution to its operator: setting t, and letting the convolution go at t = 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from convsurgery.errors import ConversionError, nearest
from convsurgery.graph import aliases
from convsurgery.operators import Blend, Start
from convsurgery.surgery.plan import Entry
from convsurgery.surgery.record import record, set_record, unwrap

__all__ = ["blend_modules", "blends", "finish_blend", "set_blend"]


def blends(model: nn.Module) -> dict[str, float]:
    """The blends of ``model`` in execution order, by name, and how far each is: t from 0 to 1."""
    return {name: module.share for name, module in blend_modules(model).items()}


def blend_modules(model: nn.Module) -> dict[str, Blend]:
    """The modules themselves, in the order in which their sites were converted."""
    found = {name: module for name, module in unwrap(model).named_modules() if isinstance(module, Blend)}
    done = record(model)
    order = {entry.site.name: number for number, entry in enumerate(done.edits if done else ())}
    return dict(sorted(found.items(), key=lambda item: order.get(item[1].site, 0)))


def set_blend(model: nn.Module, t: float | Mapping[str, float]) -> dict[str, float]:
    """Set how far each blend is: y = (1 − t) · convolution + t · operator.

    Args:
        model: a model converted by ``blend``; changed in place. At t = 1 the convolutions stay until
            :func:`finish_blend`.
        t: for all blends, or by name.

    Returns:
        All blends as they are now.

    Raises:
        ConversionError: when there is no blend of that name, or none at all, or t is not from 0 to 1.
    """
    found = blend_modules(model)
    if not found:
        raise ConversionError("nothing in this model is blended; convert with '... by blend'")
    wanted = dict(t) if isinstance(t, Mapping) else dict.fromkeys(found, t)
    for name, value in wanted.items():
        if name not in found:
            raise ConversionError(f"no blend is named {name!r}; {nearest(name, found)}")
        if not 0 <= value <= 1:
            raise ConversionError(f"{name}: t must be from 0 to 1, not {value}")
    for name, value in wanted.items():
        found[name].set_t(float(value))
    return {name: module.share for name, module in found.items()}


def finish_blend(model: nn.Module) -> nn.Module:
    """Put the operator itself in the place of every blend that has arrived at t = 1; the convolution goes.

    In place. An optimiser made before still holds the convolutions' parameters: make a new one.
    :func:`convsurgery.finetune` does.

    Returns:
        The model; another module only where the model itself is the blend.
    """
    model = unwrap(model)
    names, done = aliases(model), record(model)
    ready = [module for module in blend_modules(model).values() if module.share == 1]
    for module in ready:
        for alias in names[id(module)]:
            parent, _, child = alias.rpartition(".")
            if alias:
                model.get_submodule(parent)._modules[child] = module.new
            else:
                model = module.new
    if done is not None and ready:
        sites = {module.site for module in ready}
        plans = tuple(
            dataclasses.replace(plan, entries=tuple(_finished(entry, sites) for entry in plan.entries))
            for plan in done.plans
        )
        set_record(model, dataclasses.replace(done, plans=plans))
    return model


def _finished(entry: Entry, sites: set[str]) -> Entry:
    """The entry as it has to be carried out from now on: with the operator alone."""
    if entry.start is None or entry.start.name != "blend" or entry.site.name not in sites:
        return entry
    return dataclasses.replace(entry, start=Start("blend", 1.0))
