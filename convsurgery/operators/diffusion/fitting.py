"""The start of a step from data: a linear reaction by least squares, then reconstruction by gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convsurgery.operators.moments import Moments
from convsurgery.operators.ridge import NormalEquations

if TYPE_CHECKING:
    from convsurgery.operators.diffusion.layer import ReactionDiffusion2d

__all__ = ["Reconstruction"]

#: passes over the data in which the layer is improved by gradient, and steps on each batch
_PASSES, _STEPS, _RATE = 3, 20, 5e-3


class Reconstruction:
    """Makes a step give what a block gave: M by least squares on the block's increment, K small, then Adam on all.

    The first pass fits the 1x1 reaction to (target − y)/h without its activation, and gives the BatchNorm the
    statistics that M then has; the next ones take gradient steps on the mean square of the output's error; the last
    measures it.
    """

    local = False

    def __init__(self, layer: ReactionDiffusion2d, ridge: float) -> None:
        self.layer, self.ridge, self.note = layer, ridge, ""
        self.shift: Tensor | None = None
        self.equations: NormalEquations | None = NormalEquations(1, layer.channels, bias=True)
        self.left = _PASSES
        self.optimizer: torch.optim.Optimizer | None = None
        self.moments = Moments()

    def add(self, input: Tensor, output: Tensor, target: Tensor) -> None:
        if self.equations is not None:
            increment = target - input if self.layer.residual else target
            self.equations.add(input, increment / self.layer.time_step().detach())
        elif self.left:
            self._improve(input, target)
        else:
            self.moments.add(output, target)

    def _improve(self, input: Tensor, target: Tensor) -> None:
        layer = self.layer
        flags = [(p, p.requires_grad) for p in layer.parameters()]
        layer.requires_grad_(True)
        try:
            if self.optimizer is None:
                self.optimizer = torch.optim.Adam(layer.parameters(), lr=_RATE)
            scale = target.var().clamp_min(1e-12)
            for _ in range(_STEPS):
                with torch.enable_grad():
                    loss = (layer(input) - target).square().mean() / scale
                    self.optimizer.zero_grad()
                    loss.backward()
                self.optimizer.step()
            self.optimizer.zero_grad()
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def finish(self) -> float | None:
        if self.equations is not None:
            with torch.no_grad():
                self._begin(self.equations)
            self.note = self.equations.note
            self.equations = None
            return None
        if self.left:
            self.left -= 1
            return None
        return self.moments.error()

    def _begin(self, equations: NormalEquations) -> None:
        layer = self.layer
        weight, bias, _ = equations.solve(self.ridge)
        assert equations.gram is not None
        assert bias is not None
        layer.mix.weight.copy_(weight[..., None, None])
        layer.weight.mul_(0.1)
        if not isinstance(layer.norm, nn.BatchNorm2d):
            assert layer.mix.bias is not None
            layer.mix.bias.copy_(bias)
            return
        gram = equations.gram[0] / equations.gram[0, -1, -1]
        mean = weight @ gram[-1, :-1]
        covariance = gram[:-1, :-1] - torch.outer(gram[-1, :-1], gram[-1, :-1])
        variance = ((weight @ covariance) * weight).sum(1).clamp_min(0)
        norm = layer.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(bias + mean)
