"""Working through a batch image by image, where that keeps intermediate results in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["by_image", "worth_chunking"]

#: values of a batch from which on passes over fresh memory cost more than the calls for each image
_LARGE = 1 << 21


def worth_chunking(*tensors: Tensor | None, least: int = _LARGE) -> bool:
    """Whether to go in parts: plain tensors on the CPU, nothing recorded or traced, ``least`` values or more."""
    first = tensors[0]
    assert first is not None
    if torch.compiler.is_compiling() or first.device.type != "cpu" or first.numel() < least:
        return False
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors if t is not None):
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)


def by_image(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """``function`` of batches of one image, one after the other; its results are of one shape."""
    first = function(*(batch[:1] for batch in batches))
    out = first.new_empty((batches[0].shape[0], *first.shape[1:]))
    out[:1] = first
    for n in range(1, out.shape[0]):
        out[n : n + 1] = function(*(batch[n : n + 1] for batch in batches))
    return out
