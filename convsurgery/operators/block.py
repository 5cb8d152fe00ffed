"""The null operator of structures: a block moved into a module of its own. What stays bit-equal was only moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from convsurgery.geometry import Block as Cut
from convsurgery.operators.base import Built, OperatorConfig, Start, register_operator

__all__ = ["Block"]


@register_operator("block")
@dataclass(frozen=True)
class Block(OperatorConfig):
    """The matched layers as one module: ``residual->block`` changes no output bit, only where the layers are kept."""

    summary: ClassVar[str] = "the matched layers themselves, as one module"
    formula: ClassVar[str] = "what the layers compute"
    source: ClassVar[str] = "the null rule of structures"
    starts: ClassVar[dict[str, str]] = {"copy": "exact"}
    patterns: ClassVar[tuple[str, ...]] = ("*",)

    def build_block(self, module: nn.Module, block: Cut, start: Start) -> Built:
        return Built(module)
