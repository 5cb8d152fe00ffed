"""FX tracing with the leaf rules that timm and torchvision register, and ours."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convsurgery.graph.alone import quietly

__all__ = ["Region", "followers", "owners_read", "regions", "trace", "trace_owner"]


@dataclass(frozen=True)
class Region:
    """The graph of one module's forward; ``name`` is the module's, "" for the whole model."""

    name: str
    graph: fx.Graph

    def absolute(self, target: object) -> str:
        """The name in the model of a module or tensor that the graph names ``target``."""
        return f"{self.name}.{target}" if self.name else str(target)


class _Tracer(fx.Tracer):
    """Keeps convolutions, batch norms and registered modules whole, whatever package they come from."""

    def __init__(self, leaves: tuple[type[nn.Module], ...], functions: tuple[Any, ...]) -> None:
        super().__init__(autowrap_functions=functions)
        self._leaves = leaves
        self._thread = threading.get_ident()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        made, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return self._unnoticed(made), args

    def _unnoticed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """While FX traces, every module of the process calls FX; here those of other threads go their own way again."""
        plain = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}

        @functools.wraps(forward)
        def traced(*args: Any, **kwargs: Any) -> Any:
            patched = {name: getattr(nn.Module, name) for name in plain}
            for name, method in patched.items():
                setattr(nn.Module, name, _by_thread(self._thread, method, plain[name]))
            try:
                return forward(*args, **kwargs)
            finally:
                for name, method in patched.items():
                    setattr(nn.Module, name, method)

        return traced

    # FX has patched the classes a moment before ``traced`` begins, and puts them back a moment after it ends.
    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        home = type(m).__module__
        # torchvision's own extractor treats its ops (NMS, RoI pooling, ...) as leaves; its plain blocks live there too.
        from_package = home.startswith(_LEAF_PACKAGES) and not (home == "torchvision.ops.misc" and _holds_conv(m))
        if from_package or isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name):
            return True
        # What differs between training and evaluation must not be written into a graph, so it stays a module.
        return _asks_for_training(type(m).forward) and not _holds_conv(m)


def _by_thread(thread: int, own: Callable[..., Any], others: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is ``own`` in one thread and ``others`` in all others."""

    @functools.wraps(others)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (own if threading.get_ident() == thread else others)(self, *args, **kwargs)

    return method


_LEAF_PACKAGES = ("torchvision.ops", "convsurgery.operators", "timm.layers.activations")


class _OwnerTracer(_Tracer):
    """Enters only the modules on the way to given members; everything else stays whole."""

    def __init__(self, leaves: Any, functions: Any, opened: Collection[str]) -> None:
        super().__init__(leaves, functions)
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._opened


@cache
def _asks_for_training(forward: Callable[..., Any]) -> bool:
    code = getattr(forward, "__code__", None)
    return code is not None and "training" in code.co_names


def _holds_conv(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


def _leaf_rules() -> tuple[tuple[type[nn.Module], ...], tuple[Any, ...]]:
    from timm.layers import get_notrace_functions, get_notrace_modules

    return (nn.Conv2d, _BatchNorm, *get_notrace_modules()), tuple(get_notrace_functions())


def _quietly(tracer: fx.Tracer, model: nn.Module) -> fx.Graph:
    if "forward" in vars(model):  # FX would follow that of the class
        raise TypeError("forward was replaced on the instance")
    # FX warns of what it specialises; the plan says how the model was seen.
    with quietly():
        return tracer.trace(model)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a forward pass; raises whatever FX raises for a model that does not trace."""
    return _quietly(_Tracer(*_leaf_rules()), model)


def trace_owner(owner: nn.Module, opened: Collection[str]) -> fx.Graph:
    """The graph of ``owner`` with all modules below it whole but those named in ``opened``; raises as :func:`trace`."""
    return _quietly(_OwnerTracer(*_leaf_rules(), opened), owner)


def regions(model: nn.Module, context: AbstractContextManager[Any]) -> tuple[tuple[Region, ...], str | None]:
    """Graphs that together show as much of ``model`` as FX can follow, and why the model as a whole has none.

    A model that traces gives one region, and one for each leaf that hides convolutions; of one that does not, the
    largest modules that trace.
    """
    found: list[Region] = []
    failures: list[str] = []
    with context:
        _add_regions(model, "", found, failures)
    traced = any(region.name == "" for region in found)
    return tuple(found), None if traced else failures[0]


def _add_regions(module: nn.Module, name: str, found: list[Region], failures: list[str]) -> None:
    if isinstance(module, nn.Conv2d | torch.jit.ScriptModule) and name:
        return
    try:
        region = Region(name, trace(module))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        failures.append(reason[0].partition(". ")[0])
        inside: Sequence[tuple[str, nn.Module]] = list(module.named_children())
    else:
        found.append(region)
        targets = dict.fromkeys(str(node.target) for node in region.graph.nodes if node.op == "call_module")
        inside = [(target, module.get_submodule(target)) for target in targets]
    for child, part in inside:
        if _holds_conv(part):
            _add_regions(part, f"{name}.{child}" if name else child, found, failures)


def owners_read(region: Region) -> set[str]:
    """Names of the modules whose parameters or buffers the graph uses directly; asking for a dtype is no use."""
    return {
        owner
        for node in region.graph.nodes
        if node.op == "get_attr" and any(user.target is not getattr for user in node.users)
        if (owner := region.absolute(node.target).rpartition(".")[0])  # the root's own are used in its own call
    }


def followers(regions: Sequence[Region], modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Pairs of a module called at one place whose output goes to one BatchNorm2d alone, and that BatchNorm.

    ``modules`` holds every name of every module. The BatchNorm too must be called at one place, and keep running
    statistics.
    """
    calls = Counter(
        id(modules[region.absolute(node.target)])
        for region in regions
        for node in region.graph.nodes
        if node.op == "call_module"
    )
    for region in regions:
        for node in region.graph.nodes:
            if node.op != "call_module" or len(node.users) != 1:
                continue
            user = next(iter(node.users))
            if user.op != "call_module" or user.args != (node,) or user.kwargs:
                continue
            name, norm_name = region.absolute(node.target), region.absolute(user.target)
            norm = modules[norm_name]
            if calls[id(modules[name])] != 1 or calls[id(norm)] != 1:
                continue
            if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and keeps_statistics(norm):
                yield name, norm_name


def keeps_statistics(norm: nn.Module) -> bool:
    """Whether a normalisation uses the statistics of a whole training set in eval mode."""
    return isinstance(getattr(norm, "running_mean", None), torch.Tensor) and isinstance(
        getattr(norm, "running_var", None), torch.Tensor
    )
