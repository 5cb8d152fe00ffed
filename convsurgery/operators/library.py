"""The torch library that all operators of the project define their ops in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LIBRARY", "batch_optional", "define_op"]

#: Kept alive for the life of the process: the ops vanish with their Library.
LIBRARY = torch.library.Library("convsurgery", "DEF")


def define_op(schema: str, function: Callable[..., Tensor]) -> None:
    """Define ``convsurgery::name`` by its schema, ``name(...) -> Tensor``, and its body of torch ops.

    CompositeImplicitAutograd gives autograd, fake tensors, vmap and torch.compile from that one body, while
    torch.export keeps the op whole.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(schema.partition("(")[0], batch_optional(function), "CompositeImplicitAutograd")


def batch_optional(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` of a batch, also for one image. Decided inside the op, where a tracer need not follow."""

    def call(x: Tensor, *rest: Any) -> Tensor:
        return function(x, *rest) if x.dim() == 4 else function(x.unsqueeze(0), *rest).squeeze(0)

    return call
