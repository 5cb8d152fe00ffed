"""After an edit: what was put in is what runs, as often as what it replaced, and nothing that was taken out runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from convsurgery import zoo
from convsurgery.errors import ConversionError, warn
from convsurgery.graph import as_arguments, count_calls
from convsurgery.surgery.plan import Plan

__all__ = ["Placed", "carry_attributes", "check_calls"]


@dataclass(frozen=True)
class Placed:
    """A module that was put in, with the name of its site and how often a forward pass should call it."""

    module: nn.Module
    label: str
    calls: int


def _inputs_of(model: nn.Module, plan: Plan) -> tuple[tuple[Any, ...], bool]:
    """Inputs of the shapes ``plan`` was made with; and whether they are surely of the kind that the model takes."""
    try:
        usual = zoo.example_inputs(model)
    except Exception:  # a model of one's own may describe itself in any way
        usual = ()
    leaves, tree = tree_flatten(usual)
    if usual and all(isinstance(leaf, torch.Tensor) for leaf in leaves) and len(leaves) == len(plan.input_shapes):
        shaped = [leaf.flatten()[0].expand(shape) for leaf, shape in zip(leaves, plan.input_shapes, strict=True)]
        return tree_unflatten(shaped, tree), [tuple(leaf.shape) for leaf in leaves] == list(plan.input_shapes)
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # Whatever shape a file says, it takes no memory.
    zero = torch.zeros((), dtype=first.dtype, device=first.device)
    made = [zero.expand(shape) for shape in plan.input_shapes]
    return (made,) if len(usual) == 1 and isinstance(usual[0], list) else tuple(made), False


def carry_attributes(own: Mapping[str, Any], new: nn.Module, label: str) -> None:
    """Hang on ``new`` what somebody had hung on the convolution: tensors, children and plain attributes.

    Raises:
        ConversionError: where ``new`` has another thing of that name.
    """
    for name, value in own.items():
        if getattr(new, name, None) is value:  # a blend shows what its convolution carries
            continue
        if hasattr(new, name):
            raise ConversionError(
                f"{label} carries an attribute {name!r}, and the new layer ({type(new).__name__}) has one of its own; "
                "rename it, convert, and set it again"
            )
        if isinstance(value, nn.Parameter):
            new.register_parameter(name, value)
        elif isinstance(value, torch.Tensor):
            new.register_buffer(name, value)
        else:
            setattr(new, name, value)


def check_calls(
    model: nn.Module,
    plan: Plan,
    placed: Sequence[Placed],
    old: Mapping[str, nn.Module],
    example_inputs: Sequence[Any] | None,
    *,
    quiet: bool = False,
) -> None:
    """Run a converted model once without weights and compare the calls with the plan.

    Args:
        model: converted; not changed.
        plan: what was carried out.
        placed: what was put in.
        old: what was taken out, by name.
        example_inputs: the forward's positional arguments; None to make some of the plan's shapes.
        quiet: not to warn where the model does not run on inputs that were made so, and nothing was checked.

    Raises:
        ConversionError: when a new module is called more or less often than its site was, an old one is still called,
            or the model does not run any more.
    """
    if not placed:
        return
    try:
        inputs, known = (as_arguments(example_inputs), True) if example_inputs is not None else _inputs_of(model, plan)
    except (RuntimeError, OverflowError) as error:  # of numbers that a file may say
        raise ConversionError(f"no tensor has the plan's shapes, {plan.input_shapes}: {error}") from error
    new = {f"{number}": item.module for number, item in enumerate(placed)}
    remaining = {id(module) for module in model.modules()}
    gone = {name: module for name, module in old.items() if id(module) not in remaining}
    try:
        calls, astray = count_calls(model, inputs, new, gone)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if known:
            raise ConversionError(
                f"the model does not run after the edit, so nothing was converted: {reason}"
            ) from error
        if not quiet:
            warn(
                "whether the new layers are called could not be checked, as the model does not run on tensors of the "
                f"plan's shapes ({reason}); give apply(…, example_inputs=)"
            )
        return
    if astray:
        name, count = next(iter(astray.items()))
        raise ConversionError(
            f"{name}: the old convolution is still called {_times(count)} after the edit: something that the model's "
            "attributes do not show holds it (a closure, a global). Nothing was converted"
        )
    for number, item in enumerate(placed):
        if calls[f"{number}"] != item.calls:
            raise ConversionError(
                f"{item.label}: the model calls the new layer {_times(calls[f'{number}'])}, and what it replaced "
                f"{_times(item.calls)}: its forward treats them differently. Nothing was converted"
            )


def _times(count: int) -> str:
    return "once" if count == 1 else "never" if count == 0 else f"{count} times"
