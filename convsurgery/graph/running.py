"""One forward pass without weights, and what hooks see of it: which convolutions are called, in what order, on what.

The pass runs on a *skeleton*, a copy of the module tree that holds stand-ins for the tensors; the model itself is never
run or changed. Fake tensors carry shapes only and suffice for most models. Where the control flow depends on values
(detection: how many boxes are left), tensors are real: the model's own weights, or zeros that take no memory where the
model has none.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from convsurgery.errors import ModelError
from convsurgery.geometry import OtherConv
from convsurgery.graph.alone import quietly
from convsurgery.graph.arguments import Keywords, call
from convsurgery.graph.copying import UNCOPIED, computed_attributes, copy_model, copy_modules
from convsurgery.graph.executed import Executed
from convsurgery.graph.holders import held_values, holders
from convsurgery.graph.probes import Probes
from convsurgery.graph.watching import Call, ReadsOutside, Watch, hooked, is_scripted_conv
from convsurgery.plain import declared

__all__ = [
    "Call",
    "NoProducts",
    "Run",
    "fake",
    "is_scripted_conv",
    "placed",
    "run",
    "skeleton_of",
    "stand_in",
    "tensors",
]


@dataclass
class Run:
    """What one pass showed.

    Attributes:
        skeleton: what ran, and is in eval mode.
        mode: of its fake tensors; None where the tensors are real.
        calls: of convolutions, by the module's first name.
        norm_calls: of batch norms, by the module's first name.
        read_outside: convolutions whose tensors were used outside of their own call.
        direct: convolutions that computed without having been called as modules.
        others: executed convolutions that are no call of these modules.
        kept: for convolutions that cannot be replaced without the forward noticing: why.
    """

    skeleton: nn.Module
    mode: FakeTensorMode | None
    calls: dict[str, Call]
    norm_calls: Counter[str]
    read_outside: set[str]
    others: tuple[OtherConv, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)
    direct: frozenset[str] = frozenset()

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
    try:
        given = tree_map_only(Tensor, mode.from_tensor, placed(model, inputs))
        return _probed(model, lambda tensor: fake(tensor, mode), given, mode)
    except (DataDependentOutputException, DynamicOutputShapeException):
        pass
    except ModelError:
        raise
    except Exception as error:
        raise _does_not_run(model, inputs, error) from error
    try:
        given = tree_map_only(Tensor, stand_in, tuple(inputs))
        return _probed(model, stand_in, given, None)
    except ModelError:
        raise
    except Exception as error:
        raise _does_not_run(model, inputs, error) from error


def placed(model: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The inputs where the model is: of one without memory only their shapes count."""
    meta = any(parameter.is_meta for parameter in model.parameters())
    return tree_map_only(Tensor, lambda x: x.to("meta"), tuple(inputs)) if meta else tuple(inputs)


def _materialised(model: nn.Module, inputs: Sequence[Any]) -> nn.Module:
    """``model``, or for lazy modules a copy that ran once: only a run tells their shapes."""
    if not any(is_lazy(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())):
        return model
    copied = copy_model(model).eval()
    try:
        with torch.no_grad():
            call(copied, inputs)
    except Exception as error:
        raise _does_not_run(model, inputs, error) from error
    return copied


def skeleton_of(model: nn.Module, replace: Callable[[Tensor], Tensor], memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of the module tree in eval mode with ``replace(tensor)`` for parameters and buffers: none is copied.

    ``memo`` is filled with what stands for what, by ``id``.
    """
    memo = {} if memo is None else memo
    memo |= computed_attributes(model, replace)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not is_lazy(tensor):
            memo[id(tensor)] = replace(tensor)
    try:
        return _copied(model, memo).eval()
    except Exception as error:
        raise ModelError(f"the model cannot be copied, so it cannot be planned: {error}") from error


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    known = dict(memo)
    try:
        return copy_modules(model, memo)
    except TypeError:
        # A lock or an open file: the copy runs once and is thrown away, so it may have the model's own.
        memo.clear()
        memo.update(known)
        for place in held_values(model, UNCOPIED):
            memo[id(place.get())] = place.get()
        return copy_modules(model, memo)


def fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    # Made by hand: ``mode.from_tensor`` describes views and autograd history too, which costs more than the rest.
    made = FakeTensor(mode, torch.empty_like(tensor, device="meta", requires_grad=False), tensor.device)
    # FX follows Parameters only; this is the mark by which torch knows them in subclasses of Tensor.
    made._is_param = isinstance(tensor, nn.Parameter)
    return made


def stand_in(tensor: Tensor) -> Tensor:
    """The tensor itself; for one without memory, zeros that take none either."""
    made = tensor
    if tensor.is_meta:
        made = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=False)
    return made


class NoProducts(TorchDispatchMode):
    """Products with stand-in weights are zeros of the right shape: nothing is multiplied."""

    _PRODUCTS = frozenset({torch.ops.aten.convolution.default, torch.ops.aten.addmm.default})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._PRODUCTS and any(
            isinstance(a, Tensor) and a.numel() and not any(a.stride()) for a in args[1:]
        ):
            shape = func(*tree_map_only(Tensor, lambda a: a.to("meta"), args)).shape
            return args[0].new_zeros(shape)
        return func(*args, **(kwargs or {}))


_ASKED = "the model's forward uses its {}, which only a Conv2d has"
_UNCALLED = "the model's forward passes it over when it is no Conv2d"
_HELD = "it is also held by {}, where nothing can be exchanged"
_ASTRAY = "it is also called from somewhere else (a closure, a global, another object), where the old one would run on"


def _probed(
    model: nn.Module, replace: Callable[[Tensor], Tensor], inputs: tuple[Any, ...], mode: FakeTensorMode | None
) -> Run:
    """A pass with stand-ins for all convolutions that can be replaced without the forward noticing."""
    real = {id(module): name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    held = {
        real[key]: place.text
        for key, places in holders(model).items()
        if key in real
        for place in places
        if not place.put
    }
    kept = {name: _HELD.format(text) for name, text in held.items()}
    plain: set[str] = set()
    tentative: set[str] = set()
    while True:
        probes = Probes(skeleton_of(model, replace), {*kept, *plain})
        try:
            with quietly():
                seen, astray = _observed(probes, real, inputs, mode)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise
        except Exception:
            asked = {name: _ASKED.format(what) for name, what in probes.asked.items()}
            if not asked and plain.issuperset(real.values()):
                raise
            kept |= asked
            plain |= set() if asked else set(real.values())
            continue
        finally:
            probes.settle()
        if not kept.keys() >= set(astray):
            kept |= {name: _ASTRAY for name in astray if name not in kept}
            continue
        uncalled = set(real.values()) - seen.calls.keys() - kept.keys() - plain
        if not uncalled:
            passed_over = dict.fromkeys(tentative & seen.calls.keys(), _UNCALLED)
            return dataclasses.replace(seen, kept=kept | passed_over)
        # Nothing calls them, or nothing calls what is no Conv2d: as they are, they tell.
        tentative |= uncalled
        plain |= uncalled


def _observed(
    probes: Probes, real: Mapping[int, str], inputs: tuple[Any, ...], mode: FakeTensorMode | None
) -> tuple[Run, Collection[str]]:
    """One forward pass with hooks; and the convolutions that ran although a stand-in had their place."""
    root = probes.root
    convs = {name: module for name, module in root.named_modules() if name in probes.names}
    given = tensors(inputs)
    # Detection models take single images, everything else a batch.
    images = given[0].shape[0] if given and given[0].dim() >= 4 else max(1, len(given))
    watch = Watch(images)
    owners = {id(p): name for name, module in convs.items() for p in module.parameters(recurse=False)}
    strays = {**real, **probes.strays}
    reads = ReadsOutside(owners, watch.running, {**strays, **{id(module): name for name, module in convs.items()}})
    products = mode or NoProducts()  # type: ignore[no-untyped-call]
    executed = Executed(root, watch.running, strays, watch.direct)
    with hooked(convs, root, watch), torch.no_grad(), products, executed, reads:
        call(root, inputs)
    others = executed.others({name: call.calls for name, call in watch.calls.items()}, watch.scripted)
    return Run(
        root, mode, watch.calls, watch.norms, reads.found, others, direct=frozenset(watch.bypassed)
    ), executed.astray


def _does_not_run(model: nn.Module, inputs: Sequence[Any], error: Exception) -> ModelError:
    """What was tried, what the model said, and what its forward or its library say it takes."""
    shapes = ", ".join("x".join(map(str, x.shape)) for x in tensors(inputs))
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    lines = [f"the model does not run on inputs of shape {shapes}: {reason}", *_sizes(model, inputs)]
    try:
        signature = inspect.signature(model.forward)
        wanted = [p for p in signature.parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):  # a forward made in C++ has no signature
        wanted = []
    needed = [p.name for p in wanted if p.kind in _POSITIONAL]
    given = {name for argument in inputs if isinstance(argument, Keywords) for name in argument}
    by_name = [p.name for p in wanted if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in given]
    if type(model).__module__.startswith("torchvision.models.detection") and hasattr(model, "transform"):
        lines.append("detection models take a list of images: pass example_inputs=([image, ...],), each (C, H, W)")
    elif by_name:
        lines.append(f"its forward takes {', '.join(by_name)} by keyword: pass example_inputs={{{by_name[0]!r}: …}}")
    elif len(needed) > len(inputs):
        lines.append(f"its forward takes {', '.join(needed)}: pass example_inputs=({', '.join(needed)})")
    else:
        lines.append("pass example_inputs= with what its forward takes")
    return ModelError("\n".join(lines))


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _sizes(model: nn.Module, inputs: Sequence[Any]) -> list[str]:
    """What timm knows of the sizes a model takes, where the input is another."""
    cfg = declared(model)
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
