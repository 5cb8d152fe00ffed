"""Streaming sums of a layer's output and the one it should have: affine fits and errors, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments"]


class Moments:
    """Of two signals x and y of shape (N, C, H, W), in float64."""

    def __init__(self) -> None:
        self.sums = torch.zeros(0)
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        a, b = (t.detach().double().transpose(0, 1).flatten(1) for t in (x, y))
        sums = torch.stack([a.sum(1), b.sum(1), (a * a).sum(1), (a * b).sum(1), (b * b).sum(1)])
        self.sums = sums if self.count == 0 else self.sums + sums
        self.count += a.shape[1]

    def affine(self) -> tuple[Tensor, Tensor]:
        """Gain and offset of the least-squares fit y ≈ gain·x + offset; gain 1 for a channel that does not vary."""
        mean_x, mean_y, xx, xy, _ = self.sums / self.count
        var_x = xx - mean_x**2
        flat = var_x <= 1e-12 * xx
        gain = torch.where(flat, 1.0, (xy - mean_x * mean_y) / torch.where(flat, 1.0, var_x))
        return gain, mean_y - gain * mean_x

    def matched(self) -> tuple[Tensor, Tensor]:
        """Gain and offset that give x the mean and variance of y, of the sign in which they go together."""
        (mean_x, var_x), (mean_y, var_y) = self.statistics()
        together = self.sums[3] / self.count - mean_x * mean_y
        sign = torch.where(together < 0, -1.0, 1.0)
        gain = torch.where(var_x > 0, (var_y / var_x.clamp_min(1e-30)).sqrt() * sign, 1.0)
        return gain, mean_y - gain * mean_x

    def gain(self) -> Tensor:
        """The best gain without an offset; 1 for a channel that is always 0."""
        _, _, xx, xy, _ = self.sums / self.count
        return torch.where(xx > 0, xy / torch.where(xx > 0, xx, 1.0), 1.0)

    def offset(self, gain: Tensor) -> Tensor:
        """The best offset for a given gain."""
        mean_x, mean_y = self.sums[:2] / self.count
        best: Tensor = mean_y - gain * mean_x
        return best

    def statistics(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Mean and variance of x, then of y, (C,) each."""
        mean_x, mean_y, xx, _, yy = self.sums / self.count
        return (mean_x, (xx - mean_x**2).clamp_min(0)), (mean_y, (yy - mean_y**2).clamp_min(0))

    def error(self, gain: Tensor | float = 1.0, offset: Tensor | float = 0.0) -> float:
        """√(mean square of y − (gain·x + offset), over the variance of y), channels averaged."""
        mean_x, mean_y, xx, xy, yy = self.sums / self.count
        left = yy - 2 * gain * xy + gain**2 * xx - 2 * offset * (mean_y - gain * mean_x) + offset**2
        variance = yy - mean_y**2
        # A channel that does not vary cannot be measured by its variance.
        share = torch.where(variance <= 1e-12 * yy, 0.0, left.clamp_min(0) / variance.clamp_min(1e-30))
        return float(share.mean().sqrt())
