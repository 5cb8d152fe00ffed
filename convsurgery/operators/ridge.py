"""Streaming ridge least squares in float64: the closed form of every operator that ends in a 1x1 mix."""

from __future__ import annotations

import torch
from torch import Tensor

from convsurgery.errors import ConvSurgeryError

__all__ = ["RIDGE", "NormalEquations", "enough", "ridge_note"]

#: default strength of the penalty, relative to the mean power of the features
RIDGE = 1e-6

#: values in the Gram matrices; 8 bytes each
_BUDGET = 2**28

#: least penalty where there are fewer rows than this many for each unknown
_FEW, _STRONG = 2, 1e-2


def enough(ridge: float, rows: float, unknowns: int) -> float:
    """The penalty to use: more than asked for where the data hardly determine the unknowns."""
    return max(ridge, _STRONG) if rows < _FEW * unknowns else ridge


def ridge_note(asked: float, used: float, rows: float, unknowns: int) -> str:
    """What to say of a penalty that was raised; "" when it was not."""
    if used <= asked:
        return ""
    few = (
        f": {rows:.0f} pixels for {unknowns} unknowns" if rows < _FEW * unknowns else ": features depend on each other"
    )
    return f"ridge raised to {used:.0e}{few}"


class NormalEquations:
    """Sums for the best V in y ≈ V·a (+ b), group by group; PNN paper, eq. 8, with a penalty λ‖V‖².

    Args:
        groups: number of independent problems; features and targets are split evenly over them.
        features: number of features in each group.
        bias: whether there is a b, which is not penalised.
    """

    def __init__(self, groups: int, features: int, *, bias: bool) -> None:
        if groups * features**2 > _BUDGET:
            raise ConvSurgeryError(
                f"a fit of {groups} x {features} features needs {groups * features**2 * 8 / 2**30:.1f} GiB for its "
                f"normal equations; the limit is {_BUDGET * 8 / 2**30:.0f} GiB. Use fewer masks or filters"
            )
        self.groups, self.features, self.bias = groups, features, bias
        self.gram: Tensor | None = None
        self.count, self.note = 0, ""
        self.cross = self.power = torch.empty(0)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """One batch: features (N, g·K, H, W), targets (N, C_out, H, W)."""
        a, y = (self._rows(t) for t in (features, targets))
        if self.bias:
            a = torch.cat([a, a.new_ones(a.shape[0], a.shape[1], 1)], 2)
        self.count += a.shape[1]
        gram, cross, power = a.mT @ a, a.mT @ y, y.square().sum(1)
        if self.gram is None:
            self.gram, self.cross, self.power = gram, cross, power
        else:
            self.gram, self.cross, self.power = self.gram + gram, self.cross + cross, self.power + power

    def _rows(self, t: Tensor) -> Tensor:
        """(N, g·K, H, W) as (g, N·H·W, K) in float64."""
        t = t.detach().double()
        rows: Tensor = t.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)
        return rows

    def solve(self, ridge: float) -> tuple[Tensor, Tensor | None, float]:
        """V (C_out, K), b (C_out,) or None, and the relative error left: √(unexplained / variance), channels averaged.

        Where there are too few rows, or the Gram matrix is singular in spite of the penalty (features that never vary),
        the penalty is raised, and ``note`` says so.
        """
        assert self.gram is not None
        diagonal = torch.diagonal(self.gram, dim1=1, dim2=2)
        mean = diagonal[:, : self.features].mean(1).clamp_min(torch.finfo(torch.float64).tiny)
        penalty = torch.ones_like(diagonal)
        penalty[:, self.features :] = 0
        rows = float(self.count)
        strength = enough(ridge, rows, self.features)
        while True:
            damped = self.gram + torch.diag_embed(penalty * (strength * mean).unsqueeze(1))
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed.any():
                break
            strength = max(strength, 1e-12) * 10
        self.note = ridge_note(ridge, strength, rows, self.features)
        solution = torch.cholesky_solve(self.cross, factor)
        explained = 2 * (solution * self.cross).sum(1) - (solution * (self.gram @ solution)).sum(1)
        left = (self.power - explained).clamp_min(0)
        if self.bias:
            count = self.gram[:, -1, -1].unsqueeze(1)
            total = self.power - self.cross[:, -1].square() / count
        else:
            total = self.power
        error = float((left / total.clamp_min(1e-30)).mean().sqrt())
        weights = solution[:, : self.features].mT.flatten(0, 1)
        return weights, solution[:, -1].flatten() if self.bias else None, error
