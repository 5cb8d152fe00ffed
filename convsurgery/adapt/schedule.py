"""What changes in a converted model while it is fine-tuned: blends go to their operators, ε of neutral starts rises."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from convsurgery.adapt.config import FinetuneConfig
from convsurgery.operators.kervolution import Kervolution2d
from convsurgery.surgery import blend_modules, nonlinearity, set_nonlinearity

__all__ = ["StartSchedule"]

#: of the ε wanted at the end, what the rise from 0 begins with: equal ratios need a beginning
_FIRST_SHARE = 2.0**-10


class StartSchedule:
    """Sets every t and ε for a moment of the run.

    Args:
        model: its blends and its layers on the neutral start are driven.
        config: which way, and how long.

    Attributes:
        eps: of the layers on the neutral start when the run began, by name; empty when they are left alone.
    """

    def __init__(self, model: nn.Module, config: FinetuneConfig) -> None:
        self.model, self.config = model, config
        half = config.epochs / 2
        self.blend_epochs = half if config.blend_epochs is None else config.blend_epochs
        self.eps_epochs = half if config.nonlinearity_epochs is None else config.nonlinearity_epochs
        # Those that are left when a run is resumed keep their places in the order.
        self.follow()
        self.order = {module.site: number for number, module in enumerate(self.blends)}
        self.eps: Mapping[str, float] = {}
        if config.nonlinearity is not None:
            self.eps = {
                name: module.dial_position()
                for name, module in model.named_modules()
                if isinstance(module, Kervolution2d) and module.eps is not None
            }

    def follow(self) -> None:
        """Look for the blends that are there now; every step asks for them, and the model is large."""
        self.blends = list(blend_modules(self.model).values()) if self.config.blend != "none" else []

    @property
    def active(self) -> bool:
        return bool(self.eps or self.blends)

    def at(self, epochs: float) -> None:
        """Bring everything to where it is ``epochs`` (a fraction too) after the beginning of the run."""
        config = self.config
        if self.blends:
            done = min(1.0, epochs / self.blend_epochs)
            for module in self.blends:
                t = _curve(config.blend, self._own(done, self.order[module.site]))
                # One that begins further on is not taken back.
                module.set_t(max(t, float(module.t)))
        if self.eps and config.nonlinearity is not None:
            done = min(1.0, epochs / self.eps_epochs)
            now, rising = nonlinearity(self.model), max if config.nonlinearity > max(self.eps.values()) else min
            wanted = {name: _between(first, config.nonlinearity, done) for name, first in self.eps.items()}
            # Where a run is made longer its half comes later; what has arrived is not taken back.
            set_nonlinearity(self.model, {name: rising(value, now[name]) for name, value in wanted.items()})

    def _own(self, done: float, place: int) -> float:
        """How far a layer is when the run is ``done``: all together, or one after the other."""
        if self.config.blend_order == "together":
            return done
        count = len(self.order)
        return 1.0 if done == 1 else min(1.0, max(0.0, done * count - place))


def _between(first: float, last: float, done: float) -> float:
    """From ``first`` to ``last`` by equal ratios; from 0 by way of a small share of ``last``."""
    if first == 0:
        return 0.0 if done == 0 else (last * _FIRST_SHARE) ** (1 - done) * last**done
    return float(first ** (1 - done) * last**done)


def _curve(kind: str, done: float) -> float:
    if kind == "cosine" and 0 < done < 1:
        return (1 - math.cos(math.pi * done)) / 2
    return done
