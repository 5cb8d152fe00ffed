"""The sites of a model: which Conv2d are called, in what order, on what shapes, and which may be replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from convsurgery.adapters import adapter_for
from convsurgery.errors import ModelError
from convsurgery.geometry import ConvGeometry, OtherConv, Site
from convsurgery.graph.instance import own_method, state_hooks
from convsurgery.graph.running import Run, is_scripted_conv, run, tensors
from convsurgery.graph.tracing import Region, followers, owners_read, regions
from convsurgery.plain import declared

__all__ = ["Observation", "aliases", "observe"]


@dataclass(frozen=True)
class Observation:
    """All sites of a model, in execution order, those never called at the end.

    Attributes:
        sites: one for each Conv2d module.
        seen: "FX and hooks"; for a model that FX cannot trace as a whole "hooks, and FX in 3 parts (reason)" or "hooks
            alone (reason)".
        input_shapes: of the example inputs, batch included.
        regions: the graphs FX made of the model, or of the parts of it that trace.
        run: the pass that was observed; None for a model without Conv2d.
        others: convolutions that are executed and are no Conv2d of the model.
    """

    sites: tuple[Site, ...]
    seen: str
    input_shapes: tuple[tuple[int, ...], ...]
    regions: tuple[Region, ...] = field(default=(), repr=False, compare=False)
    run: Run | None = field(default=None, repr=False, compare=False)
    others: tuple[OtherConv, ...] = ()


def aliases(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Every dotted name of every module, by ``id``; a shared module has several."""
    names: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)] = (*names.get(id(module), ()), name)
    return names


def observe(model: nn.Module, inputs: Sequence[Any]) -> Observation:
    """See every Conv2d of ``model`` on a forward pass in eval mode.

    Args:
        model: not run, not changed; may live on the meta device.
        inputs: the forward's positional arguments: tensors, or lists and dictionaries of them. Only shapes, dtypes and
            devices matter, but where the model's control flow depends on values.

    Raises:
        ModelError: when the model does not run on such inputs, or is a TorchScript module.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model was compiled by torch.jit.script or torch.jit.trace, and its modules cannot be replaced: "
            "convert the Python model it was made from, then compile the result"
        )
    shapes = tuple(tuple(x.shape) for x in tensors(inputs))
    if not any(isinstance(module, nn.Conv2d) or is_scripted_conv(module) for module in model.modules()):
        try:
            others = run(model, inputs).others
        except ModelError:  # whatever it takes to run it, there is nothing to be replaced
            others = ()
        return Observation((), "nothing to see", shapes, others=others)
    seen = run(model, inputs)
    modules = dict(seen.skeleton.named_modules(remove_duplicate=False))
    graphs, failure = regions(seen.skeleton, seen.context)
    after = dict(followers(graphs, modules))
    # FX follows a forward that is called directly, and sees its weight as read.
    read_outside = seen.read_outside.union(*(owners_read(region) - seen.direct for region in graphs))
    sites = list(_sites(model, seen, read_outside, after))
    order = sorted(sites, key=lambda site: (site.index < 0, site.index))
    if failure is None:
        how = "FX and hooks"
    elif graphs:
        how = f"hooks, and FX in {len(graphs)} parts (the whole: {failure})"
    else:
        how = f"hooks alone (FX: {failure})"
    return Observation(tuple(order), how, shapes, graphs, seen, seen.others)


def _sites(model: nn.Module, seen: Run, read_outside: set[str], after: Mapping[str, str]) -> Iterator[Site]:
    declared = _declared_first(model)
    names_of = aliases(model)
    classes = {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}
    fakes = dict(seen.skeleton.named_modules(remove_duplicate=False))
    norm_names = aliases(seen.skeleton)
    holding: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holding.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) and not is_scripted_conv(module):
            continue
        if name not in fakes:
            raise ModelError(
                f"{name or 'the model'} is gone after one forward pass: the forward takes it out of the model. Run the "
                "model once, then convert it"
            )
        names = names_of[id(module)]
        call = seen.calls.get(name)
        batchnorm = next((after[alias] for alias in names if alias in after), None)
        if batchnorm is not None and (
            call is None or call.calls != 1 or _norm_calls(batchnorm, seen, fakes, norm_names) != 1
        ):
            batchnorm = None
        yield Site(
            names=names,
            index=-1 if call is None else call.index,
            # A lazy convolution knows its channels only after a run.
            geometry=_geometry(fakes[name]),
            input_shape=None if call is None else call.input_shape,
            output_shape=None if call is None else call.output_shape,
            calls=0 if call is None else call.calls,
            owners=_owners(name, classes),
            kind=_kind(module),
            dtype=str(module.weight.dtype).removeprefix("torch."),
            batchnorm=batchnorm,
            blocked=_blocked(module, bool(read_outside.intersection(names))) or seen.kept.get(name),
            first=bool(declared.intersection(names)),
            positions=0 if call is None else call.positions,
            tied=_tied(module, name, holding),
        )


def _tied(module: nn.Module, name: str, holding: Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    own = (parameter for parameter in module._parameters.values() if parameter is not None)
    return tuple(dict.fromkeys(other for p in own for other in holding[id(p)] if other != name))


def _norm_calls(name: str, seen: Run, modules: Mapping[str, nn.Module], names: Mapping[int, tuple[str, ...]]) -> int:
    return sum(seen.norm_calls[alias] for alias in names[id(modules[name])])


def _geometry(conv: nn.Module) -> ConvGeometry:
    adapter = adapter_for(conv)
    return adapter.geometry(conv) if adapter and isinstance(conv, nn.Conv2d) else ConvGeometry.of(conv)


def _kind(module: nn.Module) -> str:
    return "Conv2d" if is_scripted_conv(module) else type(module).__name__


def _owners(name: str, classes: Mapping[str, str]) -> tuple[str, ...]:
    """Class names of the modules around ``name``, innermost first, the model itself last."""
    found = []
    while name:
        name = name.rpartition(".")[0]
        found.append(classes[name])
    return tuple(found)


def _declared_first(model: nn.Module) -> set[str]:
    names = declared(model).get("first_conv")
    if isinstance(names, str):
        return {names}
    return {name for name in names if isinstance(name, str)} if isinstance(names, list | tuple) else set()


def _blocked(module: nn.Module, read_outside: bool) -> str | None:
    """Why no operator may take this module's place, or None."""
    if is_scripted_conv(module):
        return "inside a module compiled by torch.jit.script; convert the Python module, then compile it"
    if is_parametrized(module):
        return "its weight is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    if type(module) is not nn.Conv2d and adapter_for(module) is None:
        if isinstance(module, LazyModuleMixin):
            return "a LazyConv2d has no weights before its first run: run the model once, then convert"
        kind = type(module)
        name = f"{kind.__module__}.Conv2d" if kind.__name__ == "Conv2d" else kind.__name__
        return f"a subclass of Conv2d ({name}) whose forward may differ; register_adapter can teach it"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is recomputed by a hook (weight norm, pruning)"
    if read_outside:
        return "its weight is read outside its own call"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    replaced = own_method(module)
    if replaced is not None:
        return f"its {replaced} was replaced on this instance; del it, or make a subclass with an adapter"
    if any(hooks) or state_hooks(module):
        return "it carries hooks; remove them, convert, and register them again"
    if isinstance(module.weight, Tensor) and not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    return None
