"""All checks of one architecture; runs in a process of its own."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from convsurgery import api, zoo
from convsurgery.coverage.row import Row, versions
from convsurgery.coverage.subject import LARGE, build, family_of, normalised, pictures, smallest_inputs
from convsurgery.surgery import Plan, apply_

__all__ = ["measure"]

NULL, POLY = "all-conv->conv", "all-conv->kerv-poly"


def measure(name: str, checks: Sequence[str], max_params: float, alone: AbstractContextManager[Any]) -> Row:
    """Check one architecture; whatever goes wrong becomes part of the row.

    Args:
        name: as ``zoo.create_model`` takes it.
        checks: of :data:`CHECKS`.
        max_params: a larger model is only planned.
        alone: held while a large model has its weights, so that two never meet in memory.
    """
    began = time.perf_counter()
    values: dict[str, Any] = {}
    stage = "build"
    try:
        model = build(name, device="meta")
        values["params"] = sum(p.numel() for p in model.parameters())
        values["convolutions"] = sum(isinstance(m, nn.Conv2d) for m in model.modules())
        if values["convolutions"]:
            stage = "plan"
            values |= _planned(model)
            if values["params"] > max_params and len(checks) > 1:
                values["unfit"] = f"{values['params'] / 1e9:.2f} billion parameters"
            elif len(checks) > 1:
                stage = "null"
                size, inputs = smallest_inputs(name, model, values["params"])
                values["input"] = tuple(tuple(x.shape) for x in tree_leaves(inputs))
                if values["params"] > LARGE:
                    with alone:
                        _converted(name, size, inputs, checks, values)
                else:
                    _converted(name, size, inputs, checks, values)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        values["error"] = {"stage": values.pop("stage", stage), "type": type(error).__name__, "text": text[:300]}
    values.pop("stage", None)
    seconds = round(time.perf_counter() - began, 2)
    return Row(name, family_of(name), tuple(checks), versions(), seconds=seconds, **values)


def _planned(model: nn.Module) -> dict[str, Any]:
    from timm.models import get_graph_node_names

    plans: list[Plan] = []
    plan_seconds = _median(lambda: plans.append(api.plan(model, NULL)))
    plan = plans[-1]
    called = [entry for entry in plan.entries if entry.site.index >= 0]
    found: dict[str, Any] = {
        "visible": len(called),
        "uncalled": len(plan.entries) - len(called),
        "planned": len(plan.edits),
        "skipped": dict(Counter(str(entry.reason) for entry in plan.skips)),
        "others": {f"{other.kind} in {other.owner}": other.calls for other in plan.others},
        "seen": plan.seen,
        "plan_seconds": plan_seconds,
        **_executed(model, zoo.example_inputs(model), plan),
    }
    try:
        found["trace_seconds"] = _median(lambda: get_graph_node_names(model))
    except Exception:  # what FX cannot trace has no time to compare with
        found["trace_seconds"] = None
    return found


class _Convolutions(TorchDispatchMode):
    """Counts what torch itself dispatches, whoever asked for it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default or "deform_conv2d" in str(func)
        return func(*args, **(kwargs or {}))


def _executed(model: nn.Module, inputs: Any, plan: Plan) -> dict[str, Any]:
    """What a forward of the model itself executes, against what the plan says; nothing where it does not run."""
    counting = _Convolutions()
    placed = tree_map_only(Tensor, lambda x: x.to(next(model.parameters()).device), tuple(inputs))
    try:
        with torch.no_grad(), counting:
            model(*placed)
    except Exception:  # what depends on values does not run without them; it is counted when it has weights
        return {}
    return {"executed": counting.count, "explained": counting.count == plan.executed}


def _median(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 4)


def _converted(name: str, size: int | None, inputs: Any, checks: Sequence[str], values: dict[str, Any]) -> None:
    """The checks that need weights; fills ``values``, and "stage" with what it was at."""
    torch.manual_seed(0)
    values["stage"] = "build with weights"
    model = build(name, img_size=size)
    if size is not None and not _takes(model, inputs):
        # Without values an index out of bounds goes unseen: a smaller size was found legal that is not.
        model = build(name)
        inputs = tuple(pictures(x.shape) for x in zoo.example_inputs(model, batch=2))
        values["input"] = tuple(tuple(x.shape) for x in inputs)
    settled = _settle(model, inputs, values["params"])
    values["stage"] = "null"
    calls: list[str] = []
    with _watched(model, calls):
        before = _forward(model, inputs)
    values["finite"] = all(bool(x.isfinite().all()) for x in _floats(before))
    flags, state = _flags(model), {key: (value, _snapshot(value)) for key, value in model.state_dict().items()}
    trained, reason = _train_forward(model, inputs, values["params"])
    values["train_forward"] = reason
    plan = api.plan(model, NULL, example_inputs=inputs)
    listed = [(entry.site.name, entry.site.calls) for entry in plan.entries if entry.site.index >= 0]
    values["listed"] = listed == list(Counter(calls).items())
    values |= _executed(model, inputs, plan)
    apply_(model, plan)
    values["null_equal"] = _equal(before, _forward(model, inputs))
    values["state_equal"] = _same_state(state, model)
    values["train_equal"] = flags == _flags(model)
    if trained is not None:
        again, _ = _train_forward(model, inputs, values["params"])
        values["train_equal"] = values["train_equal"] and again is not None and _equal(trained, again)
    if "poly" in checks:
        if settled:
            nearby = tuple(x * (1 + 1e-4 * torch.randn_like(x)) for x in inputs)
            values["sensitivity"] = _error(before, _forward(model, nearby))
        values["stage"] = "poly"
        plan = api.plan(model, POLY, example_inputs=inputs)
        values["kept"] = dict(Counter(str(entry.reason) for entry in plan.skips))
        apply_(model, plan)
        values["converted"] = len(plan.edits)
        _compare(before, _forward(model, inputs), values)


def _takes(model: nn.Module, inputs: Any) -> bool:
    try:
        _forward(model, inputs)
    except (IndexError, RuntimeError):
        return False
    return True


def _settle(model: nn.Module, inputs: Any, params: int) -> bool:
    """Set BatchNorm statistics to those of random images: values have the size they have in a trained network then.

    Returns:
        Whether there were any to set, and they could be.
    """
    norms = normalised(model)
    if not norms or params > LARGE or any(isinstance(argument, list) for argument in inputs):
        return False
    images = tuple(pictures((16, *argument.shape[1:])) for argument in inputs)
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 1.0
        _forward(model.train(), images)
    except Exception:  # one value per channel is too few for a train mode; the model then stays as it was drawn
        return False
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    return True


def _forward(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return tree_map_only(Tensor, Tensor.clone, model(*inputs))


def _train_forward(model: nn.Module, inputs: Any, params: int) -> tuple[Any, str | None]:
    """Outputs and buffers of a seeded forward in train mode, undone afterwards; or why there is none."""
    if params > LARGE:
        return None, "not run, to save time: a large model"
    if any(isinstance(argument, list) for argument in inputs):
        return None, "not run: training a detector takes targets"
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    flags = [(module, module.training) for module in model.modules()]
    torch.manual_seed(1)
    try:
        out = _forward(model.train(), inputs)
        return (out, {name: buffer.clone() for name, buffer in model.named_buffers()}), None
    except Exception as error:
        return None, f"does not run in train mode: {(str(error).splitlines() or [''])[0][:120]}"
    finally:
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])


def _watched(model: nn.Module, calls: list[str]) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: calls.append(name)).remove)
    return stack


def _flags(model: nn.Module) -> dict[str, tuple[bool, bool]]:
    """Train flags after ``train()`` and after ``eval()``; the model is left in eval mode."""
    on = {name: module.training for name, module in model.train().named_modules()}
    off = {name: module.training for name, module in model.eval().named_modules()}
    return {name: (on[name], off[name]) for name in on}


def _snapshot(value: Tensor) -> tuple[int, int]:
    """What tells whether a tensor still is what it was, without a copy: where it lies, and its version."""
    return value.data_ptr(), value._version


def _same_state(state: dict[str, tuple[Tensor, tuple[int, int]]], model: nn.Module) -> bool:
    now = model.state_dict()
    if list(now) != list(state):
        return False
    # A train forward that was undone wrote into the buffers, and left the values they had.
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return all(
        _snapshot(now[key])[: 2 if key in parameters else 1] == mark[: 2 if key in parameters else 1]
        for key, (_, mark) in state.items()
    )


def _floats(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _equal(left: Any, right: Any) -> bool:
    one, other = tree_leaves(left), tree_leaves(right)
    if len(one) != len(other):
        return False
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def _compare(before: Any, after: Any, values: dict[str, Any]) -> None:
    values["poly_finite"] = all(bool(x.isfinite().all()) for x in _floats(after))
    if isinstance(before, list) and before and isinstance(before[0], dict):
        return  # a detector picks boxes: two lists of them cannot be subtracted
    if values["poly_finite"]:
        values["relative_error"] = _error(before, after)
    if isinstance(before, Tensor) and before.dim() == 2:
        values["top1_kept"] = bool((before.argmax(1) == after.argmax(1)).all())


def _error(before: Any, after: Any) -> float | None:
    """The largest difference of the outputs, relative to their largest value; None where they cannot be compared."""
    pairs = list(zip(_floats(before), _floats(after), strict=False))
    shaped = [(a, b) for a, b in pairs if a.shape == b.shape and a.numel()]
    largest = max((float(a.abs().max()) for a, _ in shaped), default=0.0)
    if not largest > 0 or len(shaped) < len(pairs):
        return None
    return max(float((a - b).abs().max()) for a, b in shaped) / largest
