"""One forward pass without weights, and what hooks see of it: which convolutions are called, in what order, on what.

The pass runs on a *skeleton*, a copy of the module tree that holds stand-ins for the tensors; the model itself is never
run or changed. Fake tensors carry shapes only and suffice for most models. Where the control flow depends on values
(detection: how many boxes are left), tensors are real: the model's own weights, or zeros that take no memory where the
model has none.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from convsurgery.errors import ModelError
from convsurgery.graph.alone import quietly
from convsurgery.graph.copying import computed_attributes, copy_model, copy_modules

__all__ = ["Call", "Run", "is_scripted_conv", "run", "tensors"]


@dataclass
class Call:
    """What the hooks saw of one convolution; shapes are those of the first call.

    ``positions`` counts output pixels over all calls, for each image that the model was given.
    """

    index: int
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    calls: int = 0
    positions: int = 0


@dataclass
class Run:
    """The calls of convolutions and of batch norms by the module's first name, convolutions read outside, what ran."""

    skeleton: nn.Module
    mode: FakeTensorMode | None
    calls: dict[str, Call]
    norm_calls: Counter[str]
    read_outside: set[str]

    @property
    def context(self) -> FakeTensorMode | ExitStack:
        """Under which the skeleton's tensors can be computed with."""
        return self.mode or ExitStack()


def tensors(inputs: Any) -> list[Tensor]:
    """All tensors in a forward's arguments, lists and dictionaries included."""
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: Sequence[Any]) -> Run:
    """Run a skeleton of ``model`` in eval mode.

    Raises:
        ModelError: when the model does not run on such inputs, or cannot be copied.
    """
    model = _materialised(model, inputs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = _skeleton(model, lambda tensor: _fake(tensor, mode))
    # Of a model without memory only the shapes of its inputs count, wherever they are.
    meta = any(parameter.is_meta for parameter in model.parameters())
    placed = tree_map_only(Tensor, lambda x: x.to("meta"), tuple(inputs)) if meta else tuple(inputs)
    try:
        with quietly():
            return _observed(skeleton, tree_map_only(Tensor, mode.from_tensor, placed), mode)
    except (DataDependentOutputException, DynamicOutputShapeException):
        pass
    except Exception as error:
        raise _does_not_run(model, inputs, error) from error
    try:
        with quietly():
            return _observed(_skeleton(model, _stand_in), tree_map_only(Tensor, _stand_in, tuple(inputs)), None)
    except Exception as error:
        raise _does_not_run(model, inputs, error) from error


def _materialised(model: nn.Module, inputs: Sequence[Any]) -> nn.Module:
    """``model``, or for lazy modules a copy that ran once: only a run tells their shapes."""
    if not any(is_lazy(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())):
        return model
    copied = copy_model(model).eval()
    try:
        with torch.no_grad():
            copied(*inputs)
    except Exception as error:
        raise _does_not_run(model, inputs, error) from error
    return copied


def _skeleton(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the module tree in eval mode with ``replace(tensor)`` for parameters and buffers: none is copied."""
    memo = computed_attributes(model, replace)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not is_lazy(tensor):
            memo[id(tensor)] = replace(tensor)
    try:
        return copy_modules(model, memo).eval()
    except Exception as error:
        raise ModelError(f"the model cannot be copied, so it cannot be planned: {error}") from error


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    # Made by hand: ``mode.from_tensor`` describes views and autograd history too, which costs more than the rest.
    made = FakeTensor(mode, torch.empty_like(tensor, device="meta", requires_grad=False), tensor.device)
    # FX follows Parameters only; this is the mark by which torch knows them in subclasses of Tensor.
    made._is_param = isinstance(tensor, nn.Parameter)
    return made


def _stand_in(tensor: Tensor) -> Tensor:
    """The tensor itself; for one without memory, zeros that take none either."""
    made = tensor
    if tensor.is_meta:
        made = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=False)
    return made


class _NoProducts(TorchDispatchMode):
    """Products with stand-in weights are zeros of the right shape: nothing is multiplied."""

    _PRODUCTS = frozenset({torch.ops.aten.convolution.default, torch.ops.aten.addmm.default})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._PRODUCTS and any(
            isinstance(a, Tensor) and a.numel() and not any(a.stride()) for a in args[1:]
        ):
            shape = func(*tree_map_only(Tensor, lambda a: a.to("meta"), args)).shape
            return args[0].new_zeros(shape)
        return func(*args, **(kwargs or {}))


def _observed(skeleton: nn.Module, inputs: tuple[Any, ...], mode: FakeTensorMode | None) -> Run:
    """One forward pass with hooks."""
    convs = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Conv2d)}
    given = tensors(inputs)
    # Detection models take single images, everything else a batch.
    images = given[0].shape[0] if given and given[0].dim() >= 4 else max(1, len(given))
    watch = _Watch(images)
    owners = {id(p): name for name, module in convs.items() for p in module.parameters(recurse=False)}
    reads = _ReadsOutside(owners, watch.running)
    products = mode or _NoProducts()  # type: ignore[no-untyped-call]
    with _hooked(convs, skeleton, watch), torch.no_grad(), products, reads:
        skeleton(*inputs)
    return Run(skeleton, mode, watch.calls, watch.norms, reads.found)


class _Watch:
    """Takes down the calls as the hooks report them."""

    def __init__(self, images: int) -> None:
        self.images = max(1, images)
        self.calls: dict[str, Call] = {}
        self.norms: Counter[str] = Counter()
        self.running: list[str] = []

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running.append(name)
        x = args[0] if args else next(iter(kwargs.values()), None)
        call = self.calls.setdefault(name, Call(len(self.calls)))
        call.calls += 1
        if call.input_shape is None and isinstance(x, Tensor):
            call.input_shape = tuple(int(n) for n in x.shape)

    def leave(self, name: str, out: Any) -> None:
        self.running.pop()
        if not isinstance(out, Tensor):
            return
        call, shape = self.calls[name], tuple(int(n) for n in out.shape)
        if call.output_shape is None:
            call.output_shape = shape
        # Without a batch there are three dimensions; detection heads run on many regions of an image.
        maps = shape[0] if len(shape) == 4 else self.images
        call.positions += shape[-1] * shape[-2] * max(1, round(maps / self.images))

    def count_norm(self, name: str) -> None:
        self.norms[name] += 1

    def enter_scripted(self, names: Sequence[str]) -> None:
        """A TorchScript module is opaque: its convolutions are taken to run once each, as they are registered."""
        for name in names:
            self.calls.setdefault(name, Call(len(self.calls))).calls += 1


@contextmanager
def _hooked(convs: Mapping[str, nn.Module], root: nn.Module, watch: _Watch) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in convs.items():
            before = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: watch.enter(name, args, kwargs), with_kwargs=True, prepend=True
            )
            after = module.register_forward_hook(lambda _, args, out, name=name: watch.leave(name, out))
            stack.callback(before.remove)
            stack.callback(after.remove)
        for name, module in list(root.named_modules()):
            if isinstance(module, _BatchNorm) and not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(lambda *_, name=name: watch.count_norm(name)).remove)
            for child, part in module.named_children():
                if isinstance(part, torch.jit.ScriptModule) and not isinstance(module, torch.jit.ScriptModule):
                    module._modules[child] = _Scripted(part, f"{name}.{child}" if name else child, watch)
                    stack.callback(module._modules.__setitem__, child, part)
        yield


class _Scripted(nn.Module):
    """Stands around a TorchScript module, which takes no hooks, and reports its calls."""

    def __init__(self, module: nn.Module, name: str, watch: _Watch) -> None:
        super().__init__()
        self.inner, self.watch = module, watch
        inside = [below for below, part in module.named_modules() if is_scripted_conv(part)]
        self.convs = [f"{name}.{below}" if below else name for below in inside]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.enter_scripted(self.convs)
        return self.inner(*args, **kwargs)


def is_scripted_conv(module: nn.Module) -> bool:
    """Whether ``module`` is a Conv2d inside a module compiled by ``torch.jit.script``."""
    return isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", "") == "Conv2d"


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


def _does_not_run(model: nn.Module, inputs: Sequence[Any], error: Exception) -> ModelError:
    """What was tried, what the model said, and what its forward or its library say it takes."""
    shapes = ", ".join("x".join(map(str, x.shape)) for x in tensors(inputs))
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    lines = [f"the model does not run on inputs of shape {shapes}: {reason}", *_sizes(model, inputs)]
    try:
        signature = inspect.signature(model.forward)
        needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind in _POSITIONAL]
    except (TypeError, ValueError):  # a forward made in C++ has no signature
        needed = []
    if type(model).__module__.startswith("torchvision.models.detection") and hasattr(model, "transform"):
        lines.append("detection models take a list of images: pass example_inputs=([image, ...],), each (C, H, W)")
    elif len(needed) > len(inputs):
        lines.append(f"its forward takes {', '.join(needed)}: pass example_inputs=({', '.join(needed)})")
    else:
        lines.append("pass example_inputs= with what its forward takes")
    return ModelError("\n".join(lines))


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _sizes(model: nn.Module, inputs: Sequence[Any]) -> list[str]:
    """What timm knows of the sizes a model takes, where the input is another."""
    cfg = getattr(model, "pretrained_cfg", None)
    given = tensors(inputs)
    if not isinstance(cfg, Mapping) or not given or given[0].dim() < 3:
        return []
    size = tuple(given[0].shape[-2:])
    lines = []
    least = cfg.get("min_input_size")
    if least and (size[0] < least[1] or size[1] < least[2]):
        lines.append(f"the smallest image it takes is {least[1]}x{least[2]}")
    if cfg.get("fixed_input_size") and size != tuple(cfg["input_size"][1:]):
        height, width = cfg["input_size"][1:]
        lines.append(f"it was built for {height}x{width} images; create it with img_size= for another size")
    return lines
