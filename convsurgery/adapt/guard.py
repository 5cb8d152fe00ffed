"""Watching a training run: divergence, values that are not finite, where they arise, and what to change."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.adapt.config import FinetuneConfig

__all__ = ["LossWatch", "Snapshot", "advice", "first_nonfinite"]

_STEPS = 10


class LossWatch:
    """Says when a loss has left for good.

    The median of ten steps, which outliers do not move, must be ``factor`` times above its lowest level *and* at least
    about as bad as guessing: right after a conversion the loss may start at nearly nothing, and any ratio to that
    would be large.

    Args:
        factor: None never stops.

    Attributes:
        guess: loss of equal scores for all classes; nothing is judged before it is set.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor, self.guess, self.lowest = factor, math.inf, math.inf
        self.recent: deque[float] = deque(maxlen=_STEPS)

    def diverged(self, loss: float) -> bool:
        """Take in the loss of a step; True when it is time to stop."""
        self.recent.append(loss)
        # From the first step on: where a run begins is what it must not leave far behind.
        level = median(self.recent)
        self.lowest = min(self.lowest, level)
        if self.factor is None or len(self.recent) < _STEPS:
            return False
        # Nine tenths, as a ruined model wavers around the loss of guessing.
        return level > max(self.factor * self.lowest, 0.9 * self.guess)

    def describe(self) -> str:
        last = ", ".join(f"{loss:.4g}" for loss in list(self.recent)[-5:])
        return f"last losses {last}" + (f"; they had been at {self.lowest:.4g}" if math.isfinite(self.lowest) else "")


class Snapshot:
    """The model's parameters and buffers at one moment, on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        self.values = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _tensors(model)]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@contextmanager
def _hooked(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Collect in ``found`` the modules whose output is not finite, in the order in which they finish."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, _: Any, output: Any) -> None:
            if not _finite(output):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, (tuple, list)) else True


def first_nonfinite(
    model: nn.Module, images: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> str | None:
    """Where a value stops being finite when ``images`` run through ``model`` once more; None when nowhere.

    Looked for in the order in which it would spread: the images, the parameters, the modules as they finish (so an
    inner module before the block around it). The model's train flag decides how it runs, and its buffers take part in
    the run; restore them afterwards.
    """
    if not _finite(images):
        return "the images of the batch themselves hold values that are not finite"
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"first parameter that is not finite: {name}"
    found: list[str] = []
    with _hooked(model, found), torch.no_grad(), autocast():
        model(images)
    return f"first output that is not finite: {found[0]}" if found else None


def nonfinite_gradients(model: nn.Module) -> str | None:
    """The parameter nearest to the output whose gradient is not finite: the backward pass came from there."""
    names = [name for name, tensor in model.named_parameters() if tensor.grad is not None and not _finite(tensor.grad)]
    return f"gradients that are not finite: {len(names)} parameters, the last one {names[-1]}" if names else None


def advice(config: FinetuneConfig, *, updated: bool) -> str:
    """What to change after a run that blew up, most promising first, with this run's numbers.

    Args:
        config: of the run.
        updated: the weights had been updated at all; if not, no learning rate is to blame.
    """
    lines = []
    if updated:
        lines.append(f"lower the learning rate from {config.lr:g} to {config.lr / 10:g} (--lr {config.lr / 10:g})")
        if config.clip_grad is None or config.clip_grad > 1:
            lines.append("limit the gradient (--clip-grad 1.0)")
        if config.sched != "none" and config.warmup_epochs < 1 < config.epochs:
            lines.append("warm up longer (--warmup-epochs 1)")
    if config.amp and config.amp_dtype == "float16":
        lines.append("use a type with more range (--amp-dtype bfloat16), or no --amp")
    elif config.amp:
        lines.append("train without --amp")
    lines.append("start closer to the convolution: a smaller eps of the neutral start, or fewer layers at once")
    return "what to change:\n" + "\n".join(f"  - {line}" for line in lines)
