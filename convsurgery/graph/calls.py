"""Does what was put in run? One pass of a converted model without weights, which counts."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_map_only

from convsurgery.graph.alone import quietly
from convsurgery.graph.arguments import call
from convsurgery.graph.executed import Executed
from convsurgery.graph.running import NoProducts, fake, placed, skeleton_of, stand_in

__all__ = ["count_calls"]


def count_calls(
    model: nn.Module, inputs: Sequence[Any], new: Mapping[str, nn.Module], old: Mapping[str, nn.Module]
) -> tuple[Counter[str], Counter[str]]:
    """How often one forward pass in eval mode calls modules that were put in, and how often those that were taken out.

    Args:
        model: not run and not changed.
        inputs: the forward's arguments.
        new: modules of ``model``, by a name for each.
        old: convolutions that are no part of it any more.

    Raises:
        Whatever the model raises on these inputs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = tree_map_only(Tensor, mode.from_tensor, placed(model, inputs))
    try:
        return _counted(model, lambda tensor: fake(tensor, mode), given, new, old, mode)
    except (DataDependentOutputException, DynamicOutputShapeException):
        given = tree_map_only(Tensor, stand_in, tuple(inputs))
        return _counted(model, stand_in, given, new, old, None)


def _counted(
    model: nn.Module,
    replace: Callable[[Tensor], Tensor],
    given: tuple[Any, ...],
    new: Mapping[str, nn.Module],
    old: Mapping[str, nn.Module],
    mode: FakeTensorMode | None,
) -> tuple[Counter[str], Counter[str]]:
    memo: dict[int, Any] = {}
    root = skeleton_of(model, replace, memo)
    calls: Counter[str] = Counter()
    for name, module in new.items():
        twin = memo[id(module)]
        twin.__dict__["forward"] = functools.partial(_count, twin.forward, calls, name)
    # What a container still holds was copied with it; what a closure holds was not.
    strays = {id(memo.get(id(module), module)): name for name, module in old.items()}
    strays |= {id(module): name for name, module in old.items()}
    executed = Executed(root, [], strays)
    with quietly(), torch.no_grad(), mode or NoProducts(), executed:  # type: ignore[no-untyped-call]
        call(root, given)
    return calls, executed.astray


def _count(forward: Callable[..., Any], calls: Counter[str], name: str, *args: Any, **kwargs: Any) -> Any:
    calls[name] += 1
    return forward(*args, **kwargs)
