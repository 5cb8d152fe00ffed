"""Watching how large the outputs of replaced layers grow in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.operators import Blend, OperatorLayer

__all__ = ["ScaleWatch"]

#: a layer is told of when its output has grown by this factor, and again each time it has done so once more
_FACTOR = 10.0
#: steps between two looks; each look makes a GPU wait once
_EVERY = 10


class ScaleWatch:
    """The root mean square of every replaced layer's output, against the first that was seen of it."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.now: dict[str, Tensor] = {}
        self.last: dict[str, float] = {}
        self.told: dict[str, float] = {}
        self.kinds: dict[str, str] = {}
        self.armed = False
        self.handles: list[Any] = []

    def follow(self, model: nn.Module) -> None:
        """Watch the operators that are there now, alone or in a blend, by hooks until :meth:`leave`."""
        self.leave()
        seen: set[int] = set()
        for name, module in model.named_modules():
            if id(module) in seen or not isinstance(module, (OperatorLayer, Blend)):
                continue
            seen |= {id(part) for part in module.modules()}
            self.kinds[name] = type(module.new if isinstance(module, Blend) else module).__name__
            self.handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_: nn.Module, args: Any, output: Any) -> None:
            if self.armed and isinstance(output, Tensor):
                self.now[name] = output.detach().float().square().mean().sqrt()

        return look

    def arm(self, step: int) -> None:
        """Say that step ``step`` of an epoch, counted from 1, begins."""
        self.armed = step % _EVERY == 1 and bool(self.handles)

    def grown(self) -> list[str]:
        """Layers that have grown since they were last told of; call after an armed step."""
        if not self.armed or not self.now:
            return []
        self.armed = False
        names, values = list(self.now), torch.stack(list(self.now.values())).tolist()
        self.now = {}
        told = []
        for name, value in zip(names, values, strict=True):
            if name not in self.first and value > 0 and math.isfinite(value):
                self.first[name] = value
            self.last[name] = value
            growth = value / self.first.get(name, math.inf)
            if growth > _FACTOR * self.told.get(name, 1.0):
                self.told[name] = growth
                told.append(f"{self._describe(name, growth)}; {_ADVICE}")
        return told

    def worst(self) -> list[str]:
        """One line on the layer that has grown most, if any has by much."""
        # A step that was stopped has not been looked at.
        for name, value in self.now.items():
            self.last[name] = float(value)
        growth = {name: value / self.first[name] for name, value in self.last.items() if name in self.first}
        if not growth:
            return []
        name = max(growth, key=lambda each: math.inf if math.isnan(growth[each]) else growth[each])
        return [self._describe(name, growth[name])] if not growth[name] < _FACTOR else []

    def _describe(self, name: str, growth: float) -> str:
        return f"the output of {name or 'the model'} ({self.kinds[name]}) is {growth:.3g} times what it was at first"

    def leave(self) -> None:
        """Take the hooks out."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


_ADVICE = "a smaller learning rate or eps, or --clip-grad, holds it"
