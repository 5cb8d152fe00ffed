"""Carrying out a plan: all of it or nothing."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.adapters import adapter_for
from convsurgery.errors import ConversionError
from convsurgery.geometry import ConvGeometry, Site
from convsurgery.graph import Place, aliases, copy_model, holders, own_attributes
from convsurgery.operators import Blend, Built, OperatorConfig, Start
from convsurgery.surgery.absorb import absorb, can_absorb
from convsurgery.surgery.check import Placed, carry_attributes, check_calls
from convsurgery.surgery.owners import guard_folds, guard_saving
from convsurgery.surgery.plan import Entry, Plan
from convsurgery.surgery.record import add_to_record, record, restore_record
from convsurgery.surgery.rewrite import chain_edit, owner_edits, rewritten

__all__ = ["Undo", "apply", "apply_", "build_layer"]

Undo = list[Callable[[], object]]


@dataclass(frozen=True)
class _Replacement:
    """One new module, and the BatchNorm values that go with it."""

    entry: Entry
    names: tuple[str, ...]
    new: nn.Module
    norm: tuple[nn.Module, Tensor] | None


@torch.inference_mode(False)
def apply(model: nn.Module, plan: Plan, *, example_inputs: Sequence[Any] | None = None) -> nn.Module:
    """A converted copy of ``model``; the model itself is not touched.

    Args:
        model: the one ``plan`` was made for, or one built alike.
        plan: what to do.
        example_inputs: the forward's positional arguments, on which one pass without weights shows that the new layers
            are what runs; by default the model's usual ones, or tensors of the plan's shapes.

    Raises:
        ConversionError: when the plan was made for another model, a weight is not finite, or the forward does not call
            a new layer as often as it called what was there; names the layer.
    """
    copied = copy_model(model)
    if copied is model:
        raise ConversionError(f"{type(model).__name__} gives itself for its copy (__deepcopy__): convert it in place")
    return apply_(copied, plan, example_inputs=example_inputs)


@torch.inference_mode(False)
def apply_(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Sequence[Any] | None = None,
    then: Callable[[nn.Module, Undo], object] | None = None,
    quiet: bool = False,
) -> nn.Module:
    """Convert ``model`` itself and return it; on any error it is as before.

    A model that *is* a convolution cannot be changed into another class: the replacement is returned instead.

    Args:
        model, plan, example_inputs: as for :func:`apply`.
        then: called with the converted model, and a list to which it adds what undoes its own changes; where it
            raises, all is as before.
        quiet: not to warn where the calls could not be checked.

    Raises:
        As :func:`apply`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = aliases(model)
    single = [_replacement(entry, modules, names) for entry in plan.edits if entry.block is None]
    blocks = [entry for entry in plan.edits if entry.block is not None]
    for entry in blocks:
        _check_block(entry, modules)
    chains = [chain_edit(entry, modules) for entry in blocks if entry.block and entry.block.chain]
    owners = owner_edits((entry for entry in blocks if entry.block and not entry.block.chain), modules)
    undo: Undo = []
    norms: dict[str, float] = {}
    root, before = model, record(model)
    held = holders(model)
    try:
        for item in single:
            root = _put(modules, item.names, item.new, root, undo, held)
            if item.norm is not None:
                norms[str(item.entry.site.batchnorm)] = absorb(*item.norm, undo=undo)
        for chain in chains:
            for name, new in chain.modules.items():
                root = _put(modules, names[id(modules[name])], new, root, undo, held)
        # The deepest come first, so that an owner is rewritten with its children as they will be.
        for edit in owners:
            for member in edit.left:
                root = _put(modules, names[id(modules[member])], nn.Identity(), root, undo, held)
            twin = rewritten(modules[edit.owner], edit)
            root = _put(modules, names[id(modules[edit.owner])], twin, root, undo, held)
        gained = [module for edit in owners for module in edit.gained.values()]
        _keep_whole([*(item.new for item in single), *gained])
        placed = [Placed(item.new, item.entry.site.label, item.entry.site.calls) for item in single]
        placed += [
            Placed(chain.modules[chain.block.members[0]], entry.site.label, entry.site.calls)
            for chain in chains
            for entry in blocks
            if entry.block is chain.block
        ]
        placed += [Placed(module, f"{edit.owner}.{name}", 1) for edit in owners for name, module in edit.gained.items()]
        old = {name: modules[name] for entry in plan.edits for name in _taken(entry) if name in modules}
        check_calls(root, plan, placed, old, example_inputs, quiet=quiet)
        guard_folds(root, undo)
        guard_saving(root, undo)
        undo.append(lambda: restore_record(model, before))
        add_to_record(root, plan, norms, before=model)
        if then is not None:
            then(root, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return root


def _taken(entry: Entry) -> tuple[str, ...]:
    """The modules that an edit takes out."""
    return (entry.site.name,) if entry.block is None else entry.block.members


def _put(
    modules: dict[str, nn.Module],
    names: tuple[str, ...],
    new: nn.Module,
    root: nn.Module,
    undo: Undo,
    held: Mapping[int, Sequence[Place]],
) -> nn.Module:
    """Set ``new`` at all ``names`` and places; returns the root, which it is itself where the root is replaced."""
    for place in held.get(id(modules[names[0]]), ()):
        if place.put is None:
            raise ConversionError(
                f"{names[0] or 'the model'} is also held by {place.text}, where nothing can be exchanged; nothing was "
                "converted"
            )
        undo.append(functools.partial(place.put, place.get()))
        place.put(new)
    for name in names:
        parent, _, child = name.rpartition(".")
        if name:
            _set(modules[parent], child, new, undo)
        else:
            root = new
    return root


def _check_block(entry: Entry, modules: dict[str, nn.Module]) -> None:
    """As for single sites: nothing is built on weights that are absent or not finite."""
    assert entry.block is not None
    for member in entry.block.members:
        for name, parameter in modules[member].named_parameters() if member in modules else ():
            if not _finite(parameter.detach()):
                raise ConversionError(f"{member}: its {name} holds NaN or infinity; nothing was converted")


def _replacement(entry: Entry, modules: dict[str, nn.Module], names: dict[int, tuple[str, ...]]) -> _Replacement:
    site, config, start = entry.site, entry.config, entry.start
    assert config is not None
    assert start is not None
    conv = modules.get(site.name)
    if not isinstance(conv, nn.Conv2d):
        what = "nothing" if conv is None else type(conv).__name__
        raise ConversionError(f"the plan is for another model: it wants a Conv2d at {site.label}, here is {what}")
    adapter = adapter_for(conv)
    geometry = ConvGeometry.of(conv) if adapter is None else adapter.geometry(conv)
    if geometry != site.geometry:
        raise ConversionError(f"the plan is for another model: {site.label} is {geometry}, planned was {site.geometry}")
    if conv.weight.is_meta and start.name == "neutral":
        raise ConversionError(f"{site.label} has no weights to start from (meta device); build the model with weights")
    for name, parameter in conv.named_parameters(recurse=False):
        if not _finite(parameter.detach()):
            raise ConversionError(f"{site.label}: its {name} holds NaN or infinity; nothing was converted")
    if site.batchnorm is not None and not isinstance(modules.get(site.batchnorm), nn.Module):
        raise ConversionError(f"the plan is for another model: there is no BatchNorm at {site.batchnorm!r:.80}")
    norm = modules.get(site.batchnorm) if entry.absorb and site.batchnorm else None
    blended = start.name == "blend"
    own = own_attributes(conv)
    # Beside its convolution an operator has weights of its own.
    model = copy.deepcopy(conv) if blended else conv
    begin = config.blended_start(site) if blended else start
    built = build_layer(model, config, begin, site, absorb=norm is not None and can_absorb(norm))
    new = built.module
    if blended and start.value != 1:
        new = Blend(conv, new, start.value or 0.0, site=site.name)
    carry_attributes(own, new, site.label)
    absorbed = None if norm is None or built.residual is None else (norm, built.residual)
    return _Replacement(entry, names[id(conv)], new, absorbed)


def build_layer(conv: nn.Conv2d, config: OperatorConfig, start: Start, site: Site, *, absorb: bool = False) -> Built:
    """What ``config`` puts in the place of ``conv`` at ``site``, through its adapter where it is a subclass.

    Arguments as for :meth:`OperatorConfig.build`; the Parameter objects of ``conv`` are reused.
    """
    adapter = adapter_for(conv)
    if adapter is None:
        return config.build(conv, start, absorb=absorb, site=site)
    plain = adapter.plain(conv)
    built = config.build(plain, start, absorb=absorb, site=site)
    return dataclasses.replace(built, module=adapter.wrap(built.module, conv, plain))


def _keep_whole(modules: Iterable[nn.Module]) -> None:
    """Tell timm's feature extraction to treat the new layers as leaves, as it treats a Conv2d."""
    from timm.layers import is_notrace_module, register_notrace_module

    for kind in {type(module) for module in modules} - {nn.Conv2d}:
        if not is_notrace_module(kind):
            register_notrace_module(kind)


def _finite(tensor: Tensor) -> bool:
    """Whether all values are; one fast pass unless the sum itself leaves the range."""
    if tensor.is_meta or math.isfinite(float(tensor.sum())):
        return True
    return bool(torch.isfinite(tensor).all())


def _set(parent: nn.Module, name: str, new: nn.Module, undo: Undo) -> None:
    old = parent._modules[name]
    undo.append(lambda: parent._modules.__setitem__(name, old))
    parent._modules[name] = new
