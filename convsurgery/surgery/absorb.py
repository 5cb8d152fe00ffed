"""A BatchNorm takes over what a new operator gives beside the convolution's output: gains and offsets of channels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from convsurgery.errors import ConversionError

__all__ = ["absorb", "can_absorb"]


def can_absorb(norm: nn.Module) -> bool:
    """Its statistics must be rescaled without loss: full precision only."""
    mean = getattr(norm, "running_mean", None)
    return isinstance(mean, Tensor) and mean.dtype in (torch.float32, torch.float64)


def absorb(
    norm: nn.Module,
    residual: Tensor,
    shift: Tensor | None = None,
    *,
    original: nn.Module | None = None,
    undo: list[Callable[[], object]] | None = None,
) -> float:
    """Make ``norm`` give on r·(y − s) what ``original`` gives on y, for r and s per channel, (C,); its new epsilon.

    r·(y − s) − r·(μ − s) over √(r²·(σ² + e) − e' + e') is (y − μ) / √(σ² + e) in eval mode for any e'. In training the
    batch variance r²σ² meets e' alone; e' = e·min r² keeps the ratio it had (exactly so where all r are alike).

    Args:
        norm: a BatchNorm with statistics in full precision; changed in place.
        residual: r.
        shift: s; 0 when absent.
        original: ``norm`` as it was in the unconverted model; ``norm`` itself when absent.
        undo: gets what brings the old values back.
    """
    source = norm if original is None else original
    mean, var, eps = norm.running_mean, norm.running_var, float(norm.eps)  # type: ignore[arg-type]
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    old_mean, old_var = mean.clone(), var.clone()

    def restore() -> None:
        mean.copy_(old_mean)
        var.copy_(old_var)
        norm.eps = eps  # type: ignore[assignment]

    if undo is not None:
        undo.append(restore)
    r = residual.to(mean.device)
    its_mean, its_var, its_eps = source.running_mean, source.running_var, float(source.eps)  # type: ignore[arg-type]
    assert isinstance(its_mean, Tensor)
    assert isinstance(its_var, Tensor)
    new_eps = its_eps * float(r.min()) ** 2
    moved = its_mean.double() if shift is None else its_mean.double() - shift.to(mean.device)
    variance = (r.square() * (its_var.double() + its_eps) - new_eps).clamp_min(0)
    mean.copy_(moved * r)
    var.copy_(variance)
    norm.eps = new_eps  # type: ignore[assignment]
    if not math.isfinite(new_eps):
        raise ConversionError("the batch norm's epsilon is not finite")
    return new_eps
