"""Finding the sites of a model: which Conv2d are called, in what order, on what shapes.

The model is never run or changed: everything happens on a copy of its modules that holds fake tensors.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from convsurgery.errors import ModelError
from convsurgery.geometry import ConvGeometry, Site
from convsurgery.graph.copying import computed_attributes, copy_model
from convsurgery.graph.tracing import followers, owners_read, trace

__all__ = ["Observation", "aliases", "observe"]


@dataclass(frozen=True)
class Observation:
    """All sites of a model, in execution order, those never called at the end.

    Attributes:
        sites: one for each Conv2d module.
        seen: "FX and hooks", or "hooks alone (reason)" for a model that FX cannot trace.
        input_shapes: of the example inputs, batch included.
    """

    sites: tuple[Site, ...]
    seen: str
    input_shapes: tuple[tuple[int, ...], ...]


@dataclass
class _Call:
    """What the hooks saw of one convolution."""

    index: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...] | None = None
    calls: int = 1


def aliases(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Every dotted name of every module, by ``id``; a shared module has several."""
    names: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)] = (*names.get(id(module), ()), name)
    return names


def observe(model: nn.Module, inputs: Sequence[Tensor]) -> Observation:
    """See every Conv2d of ``model`` on a forward pass in eval mode.

    Args:
        model: not run, not changed; may live on the meta device.
        inputs: the forward's positional arguments; only shapes, dtypes and devices matter.

    Raises:
        ModelError: when the model does not run on such inputs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = _skeleton(_materialised(model, inputs), mode).eval()
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    calls, read_outside = _run(skeleton, [mode.from_tensor(x) for x in inputs], mode)
    try:
        with mode:
            graph = trace(skeleton)
    except Exception as error:
        after: Mapping[str, str] = {}
        reason = str(error).strip().splitlines()
        seen = f"hooks alone (FX: {reason[0] if reason else type(error).__name__})"
    else:
        after, seen = followers(graph, modules), "FX and hooks"
        read_outside |= owners_read(graph)
    sites = list(_sites(model, skeleton, calls, read_outside, after))
    order = sorted(sites, key=lambda site: (site.index < 0, site.index))
    return Observation(tuple(order), seen, tuple(tuple(x.shape) for x in inputs))


def _materialised(model: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    """``model``, or for lazy modules a copy that ran once: only a run tells their shapes."""
    if not any(is_lazy(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())):
        return model
    copied = copy_model(model).eval()
    with torch.no_grad():
        _call(copied, inputs)
    return copied


def _call(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    try:
        model(*inputs)
    except Exception as error:
        shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
        raise ModelError(
            f"the model does not run on inputs of shape {shapes}: {error}\n"
            "pass example_inputs= with what its forward takes"
        ) from error


def _skeleton(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are fake: no weight is copied."""

    def fake(tensor: Tensor) -> Tensor:
        # Made by hand: ``mode.from_tensor`` describes views and autograd history too, which costs more than the rest.
        made = FakeTensor(mode, torch.empty_like(tensor, device="meta", requires_grad=False), tensor.device)
        # FX follows Parameters only; this is the mark by which torch knows them in subclasses of Tensor.
        made._is_param = isinstance(tensor, nn.Parameter)
        return made

    memo = computed_attributes(model, fake)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not is_lazy(tensor):
            memo[id(tensor)] = fake(tensor)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(f"the model cannot be copied, so it cannot be planned: {error}") from error


class _ReadsOutside(TorchFunctionMode):
    """Notes convolutions whose weight goes into a computation while another module runs."""

    def __init__(self, owners: Mapping[int, str], running: Sequence[str]) -> None:
        self.owners, self.running, self.found = owners, running, set[str]()
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor | tuple | list):  # not the likes of ``weight.dtype``
            for argument in itertools.chain(args, (kwargs or {}).values()):
                for value in argument if isinstance(argument, tuple | list) else (argument,):
                    owner = self.owners.get(id(value))
                    if owner is not None and owner not in self.running and func.__name__ != "__get__":
                        self.found.add(owner)
        return out


def _run(skeleton: nn.Module, inputs: list[Tensor], mode: FakeTensorMode) -> tuple[dict[str, _Call], set[str]]:
    """One forward pass with hooks: the calls by first name, and the convolutions read outside their call."""
    convs = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Conv2d)}
    calls: dict[str, _Call] = {}
    running: list[str] = []
    owners = {id(p): name for name, module in convs.items() for p in module.parameters(recurse=False)}
    reads = _ReadsOutside(owners, running)

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(name)
        x = args[0] if args else next(iter(kwargs.values()), None)
        shape = tuple(int(n) for n in x.shape) if isinstance(x, Tensor) else ()
        if name in calls:
            calls[name].calls += 1
        else:
            calls[name] = _Call(len(calls), shape)

    def leave(name: str, out: Any) -> None:
        running.pop()
        if isinstance(out, Tensor) and calls[name].output_shape is None:
            calls[name].output_shape = tuple(int(n) for n in out.shape)

    with _hooked(convs, enter, leave), torch.no_grad(), mode, reads:
        _call(skeleton, inputs)
    return calls, reads.found


@contextmanager
def _hooked(convs: Mapping[str, nn.Module], enter: Any, leave: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in convs.items():
            before = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True, prepend=True
            )
            after = module.register_forward_hook(lambda _, args, out, name=name: leave(name, out))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _sites(
    model: nn.Module,
    skeleton: nn.Module,
    calls: Mapping[str, _Call],
    read_outside: set[str],
    after: Mapping[str, str],
) -> Iterator[Site]:
    declared = _declared_first(model)
    names_of = aliases(model)
    classes = {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}
    fakes = dict(skeleton.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        names = names_of[id(module)]
        call = calls.get(name)
        batchnorm = next((after[alias] for alias in names if alias in after), None)
        yield Site(
            names=names,
            index=-1 if call is None else call.index,
            # A lazy convolution knows its channels only after a run.
            geometry=ConvGeometry.of(fakes[name]),
            input_shape=None if call is None else call.input_shape,
            output_shape=None if call is None else call.output_shape,
            calls=0 if call is None else call.calls,
            owners=_owners(name, classes),
            kind=type(module).__name__,
            dtype=str(module.weight.dtype).removeprefix("torch."),
            batchnorm=batchnorm if call is not None and call.calls == 1 else None,
            blocked=_blocked(module, bool(read_outside.intersection(names))),
            first=bool(declared.intersection(names)),
        )


def _owners(name: str, classes: Mapping[str, str]) -> tuple[str, ...]:
    """Class names of the modules around ``name``, innermost first, the model itself last."""
    found = []
    while name:
        name = name.rpartition(".")[0]
        found.append(classes[name])
    return tuple(found)


def _declared_first(model: nn.Module) -> set[str]:
    cfg = getattr(model, "pretrained_cfg", None)
    names = cfg.get("first_conv") if isinstance(cfg, Mapping) else None
    return set() if not names else {names} if isinstance(names, str) else set(names)


def _blocked(module: nn.Conv2d, read_outside: bool) -> str | None:
    """Why no operator may take this module's place, or None."""
    if is_parametrized(module):
        return "its weight is parametrized"
    if type(module) is not nn.Conv2d:
        return f"a subclass of Conv2d ({type(module).__name__}) whose forward may differ"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is recomputed by a hook (weight norm, pruning)"
    if read_outside:
        return "its weight is read outside its own call"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        return "it carries hooks; remove them, convert, and register them again"
    return None
