"""Carrying out a plan: all of it or nothing."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convsurgery.adapters import adapter_for
from convsurgery.errors import ConversionError
from convsurgery.geometry import ConvGeometry, Site
from convsurgery.graph import aliases, copy_model
from convsurgery.operators import Blend, Built, OperatorConfig, Start
from convsurgery.surgery.absorb import absorb, can_absorb
from convsurgery.surgery.plan import Entry, Plan
from convsurgery.surgery.record import add_to_record
from convsurgery.surgery.rewrite import chain_edit, owner_edits, rewritten

__all__ = ["apply", "apply_", "build_layer"]


@dataclass(frozen=True)
class _Replacement:
    """One new module, and the BatchNorm values that go with it."""

    entry: Entry
    names: tuple[str, ...]
    new: nn.Module
    norm: tuple[nn.Module, Tensor] | None


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A converted copy of ``model``; the model itself is not touched.

    Raises:
        ConversionError: when the plan was made for another model, or a weight is not finite; names the layer.
    """
    return apply_(copy_model(model), plan)


def apply_(model: nn.Module, plan: Plan) -> nn.Module:
    """Convert ``model`` itself and return it; on any error it is as before.

    A model that *is* a convolution cannot be changed into another class: the replacement is returned instead.
    Raises as :func:`apply`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = aliases(model)
    single = [_replacement(entry, modules, names) for entry in plan.edits if entry.block is None]
    blocks = [entry for entry in plan.edits if entry.block is not None]
    for entry in blocks:
        _check_block(entry, modules)
    chains = [chain_edit(entry, modules) for entry in blocks if entry.block and entry.block.chain]
    owners = owner_edits((entry for entry in blocks if entry.block and not entry.block.chain), modules)
    undo: list[Callable[[], None]] = []
    norms: dict[str, float] = {}
    root = model
    try:
        for item in single:
            root = _put(modules, item.names, item.new, root, undo)
            if item.norm is not None:
                norms[str(item.entry.site.batchnorm)] = absorb(*item.norm, undo=undo)
        for chain in chains:
            for name, new in chain.modules.items():
                root = _put(modules, names[id(modules[name])], new, root, undo)
        # The deepest come first, so that an owner is rewritten with its children as they will be.
        for edit in owners:
            for member in edit.left:
                root = _put(modules, names[id(modules[member])], nn.Identity(), root, undo)
            twin = rewritten(modules[edit.owner], edit)
            root = _put(modules, names[id(modules[edit.owner])], twin, root, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    gained = [module for edit in owners for module in edit.gained.values()]
    _keep_whole([*(item.new for item in single), *gained])
    add_to_record(root, plan, norms, before=model)
    return root


def _put(
    modules: dict[str, nn.Module],
    names: tuple[str, ...],
    new: nn.Module,
    root: nn.Module,
    undo: list[Callable[[], None]],
) -> nn.Module:
    """Set ``new`` at all ``names``; returns the root, which it is itself where the root is replaced."""
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
    # Beside its convolution an operator has weights of its own.
    model = copy.deepcopy(conv) if blended else conv
    begin = config.blended_start(site) if blended else start
    built = build_layer(model, config, begin, site, absorb=norm is not None and can_absorb(norm))
    new = built.module
    if blended and start.value != 1:
        new = Blend(conv, new, start.value or 0.0, site=site.name)
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


def _set(parent: nn.Module, name: str, new: nn.Module, undo: list[Callable[[], None]]) -> None:
    old = parent._modules[name]
    undo.append(lambda: parent._modules.__setitem__(name, old))
    parent._modules[name] = new
