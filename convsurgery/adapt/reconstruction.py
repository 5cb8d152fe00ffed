"""Making one layer give what its convolution gave, by gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convsurgery.operators.moments import Moments

__all__ = ["Reconstructed", "reconstruct"]

#: gradient steps on one part of a batch before the next is computed: running the model up to the layer costs more
_STEPS = 10


@dataclass(frozen=True)
class Reconstructed:
    """The relative error in the end, and what to say of it."""

    error: float
    note: str


def reconstruct(
    layer: nn.Module,
    pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    steps: int,
    lr: float,
    shift: Tensor | None = None,
) -> Reconstructed:
    """Adam on the mean square of (layer(x) + shift − y), with a rate that falls to 0 along a cosine.

    Never worse on the data than before: weights that are go back.

    Args:
        layer: changed in place; its other modules' parameters are not touched.
        pairs: starts a pass over inputs x (N, C_in, H, W) and wanted outputs y (N, C_out, H', W').
        steps: of gradient descent.
        lr: learning rate relative to the root mean square of each parameter.
        shift: (C_out,), added to the output behind the layer.
    """
    before = _error(layer, pairs(), shift)
    kept = [(p, p.detach().clone()) for p in layer.parameters()]
    flags = [(p, p.requires_grad) for p in layer.parameters()]
    layer.requires_grad_(True)
    try:
        _descend(layer, pairs, steps, lr, shift)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
    after = _error(layer, pairs(), shift)
    if not after < before:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        return Reconstructed(before, f"{steps} steps did not help")
    return Reconstructed(after, f"{steps} steps: {before:.2g} → {after:.2g}")


def _descend(
    layer: nn.Module,
    pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    steps: int,
    lr: float,
    shift: Tensor | None,
) -> None:
    groups = [
        {"params": [p], "lr": lr * max(float(p.detach().float().square().mean().sqrt()), 1e-3)}
        for p in layer.parameters()
        if p.is_floating_point()
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    taken = 0
    while taken < steps:
        for x, y in pairs():
            scale = y.float().var().clamp_min(1e-12)
            for _ in range(min(_STEPS, steps - taken)):
                with torch.enable_grad():
                    out = layer(x) if shift is None else layer(x) + shift.to(y).view(-1, 1, 1)
                    loss = (out.float() - y.float()).square().mean() / scale
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                schedule.step()
                taken += 1
            if taken >= steps:
                return


def _error(layer: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], shift: Tensor | None) -> float:
    moments = Moments()
    with torch.no_grad():
        for x, y in pairs:
            moments.add(layer(x), y)
    return moments.error(1.0, 0.0 if shift is None else shift.double())
