"""Which dtype an operator computes in and returns."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["REDUCED", "no_autocast", "no_grad_needed", "result_dtype", "transformed", "widened"]

REDUCED = (torch.float16, torch.bfloat16)


def result_dtype(x: Tensor) -> torch.dtype:
    """What ``F.conv2d(x, ...)`` would return, autocast considered."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside, nothing is lowered to half precision; distances need this, as ``torch.cdist`` does."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in REDUCED else x


def transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation follows what is computed.

    They find no autograd Function inside of an op, and derive some operations in place wrongly (b.mul_(b)).
    """
    # As torch.autograd.Function.apply itself asks.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def no_grad_needed(*tensors: Tensor | None) -> bool:
    """Whether a freshly made result may be overwritten: autograd records nothing here."""
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)
