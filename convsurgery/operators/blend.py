"""A convolution and the operator that is to take its place, side by side: y = (1 − t) · conv(x) + t · new(x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from convsurgery.folding import refuse_folding

__all__ = ["Blend"]


class Blend(nn.Module):
    """``(1 − t) · original(x) + t · new(x)``; ``original(x)`` itself at t = 0, ``new(x)`` at t = 1.

    What takes no part is not run: at either end it costs what one of the two costs. Attributes that it lacks are those
    of ``original``, so that code that asks a convolution for its channels goes on to work.

    Args:
        original: what stood there, a convolution or the layers of a block.
        new: what is to take its place; shares no parameters with it.
        t: from 0 to 1.
        site: name of the convolution, or of the block's first, in the unconverted model.
    """

    t: Tensor

    def __init__(self, original: nn.Module, new: nn.Module, t: float = 0.0, *, site: str = "") -> None:
        super().__init__()
        self.original, self.new, self.site = original, new, site
        home = next((p.device for p in original.parameters()), None)
        self.register_buffer("t", torch.zeros((), dtype=torch.float32, device=home))
        # Which of the two run. An int beside the buffer: reading the buffer would make a GPU wait, and a compiler too.
        self._stage = 0
        self.set_t(t)
        self.train(original.training)

    def set_t(self, t: float) -> None:
        """Set the share of ``new``; ValueError outside of 0 … 1."""
        if not 0 <= t <= 1:
            raise ValueError(f"t must be from 0 to 1, not {t}")
        if not self.t.is_meta:
            self.t.fill_(t)
        self._stage = 0 if t == 0 else 2 if t == 1 else 1

    @property
    def share(self) -> float:
        """t as a number; on the meta device, which has no values, 0 or 1 where it is at an end and else 0.5."""
        return (0.0, 0.5, 1.0)[self._stage] if self.t.is_meta else float(self.t)

    def forward(self, input: Tensor) -> Tensor:
        if self._stage == 1:
            old: Tensor = self.original(input)
            new: Tensor = self.new(input)
            return (1 - self.t) * old + self.t * new
        runs, rests = (self.original, self.new) if self._stage == 0 else (self.new, self.original)
        out: Tensor = runs(input)
        if self.training and torch.is_grad_enabled() and _several_processes():
            for parameter in rests.parameters():
                if parameter.requires_grad:
                    out = out + (parameter.flatten()[:1].sum() * 0).to(out.dtype)
        return out

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            refuse_folding(type(self).__name__)
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "original" in modules and not name.startswith("_"):
                return getattr(modules["original"], name)
            raise

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "t" in state_dict:
            self.set_t(float(state_dict[prefix + "t"]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.t
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.t.dtype != before.dtype:  # a share of 1/1000 is nothing to bfloat16
            self.t = before.to(self.t.device)
        return self

    def extra_repr(self) -> str:
        return "" if self.t.is_meta else f"t={float(self.t):.4g}"


def _several_processes() -> bool:
    """They wait for a gradient of every parameter, also of one that takes no part yet."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
