"""Least squares for LinearMix: every output sees the middle pixel of all channels, and the window of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from convsurgery.operators.ridge import enough, ridge_note

if TYPE_CHECKING:
    from convsurgery.operators.linear_mix import LinearMix2d

__all__ = ["SparseFit"]


class SparseFit:
    """Normal equations restricted to the free values, streaming, in float64; never worse than the projection.

    For output o of a group the features are c = the middle pixels of the group's channels (and 1, for an offset), the
    same for all outputs, and t_o = the other taps of channel o alone. With c eliminated by one Cholesky factor of
    E[ccᵀ], what is left for each output is a system of as many unknowns as the window has other taps.

    Args:
        layer: whose ``weight``, ``mix`` and ``bias`` are set.
        weight: the convolution's filters.
        ridge: strength of the penalty, relative to the mean power of the middle pixels.
        shift: whether an offset may be left over where the layer has no bias.
    """

    local = False

    def __init__(self, layer: LinearMix2d, weight: Tensor, ridge: float, *, shift: bool) -> None:
        self.layer, self.dense, self.ridge, self.note = layer, weight, ridge, ""
        self.offsets = shift or layer.bias is not None
        self.shift: Tensor | None = None
        self.sums: dict[str, Tensor] = {}

    def add(self, input: Tensor, output: Tensor, target: Tensor) -> None:
        layer = self.layer
        x, padding = layer.padded(input.detach())
        x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]]).double()
        taps = self._taps(x, (target.shape[-2], target.shape[-1]))
        kernel = layer.kernel_size
        middle = (kernel[0] - 1) // 2 * kernel[1] + (kernel[1] - 1) // 2
        groups, shared = layer.groups, layer.weight.shape[0]
        outputs, inputs = layer.shared()
        c = _rows(taps[middle]).unflatten(0, (groups, -1))  # (g, K, P)
        if self.offsets:
            c = torch.cat([c, c.new_ones(groups, 1, c.shape[2])], 1)
        y = _rows(target.detach().double())
        others = [_rows(tap[:, inputs]) for place, tap in enumerate(taps) if place != middle]
        t = torch.stack(others, 1) if others else c.new_zeros(shared, 0, c.shape[2])  # (S, T, P)
        per_group = t.unflatten(0, (groups, -1))  # (g, s, T, P)
        parts = {
            "cc": c @ c.mT,
            "cy": c @ y.unflatten(0, (groups, -1)).mT,
            "ct": torch.einsum("gkp,gstp->gskt", c, per_group),
            "tt": t @ t.mT,
            "ty": (t @ y[outputs].unsqueeze(2)).squeeze(2),
            "yy": y.square().sum(1),
            "y": y.sum(1),
            "n": y.new_tensor(float(y.shape[1])),
        }
        for name, part in parts.items():
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def _taps(self, x: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """What each place under the window holds, (N, C_in, H_out, W_out), rows first."""
        layer, found = self.layer, []
        (sh, sw), (dh, dw) = layer.stride, layer.dilation
        for i in range(layer.kernel_size[0]):
            for j in range(layer.kernel_size[1]):
                rows = slice(i * dh, i * dh + (size[0] - 1) * sh + 1, sh)
                found.append(x[:, :, rows, j * dw : j * dw + (size[1] - 1) * sw + 1 : sw])
        return found

    @torch.no_grad()
    def finish(self) -> float:
        layer, sums = self.layer, self.sums
        channels = layer.mix.shape[1]
        shared = layer.weight.shape[0]
        fitted = self._solve()
        before = self._projection()
        chosen = min((fitted, before), key=lambda candidate: float(self._left(*candidate).sum()))
        u, v = chosen  # (g, K, out), (S, T)
        outputs, inputs = layer.shared()
        own = inputs % channels
        mix = u[:, :channels].mT.flatten(0, 1).clone()  # (C_out, K)
        window = layer.weight.new_zeros(shared, layer.kernel_size[0] * layer.kernel_size[1], dtype=torch.float64)
        middle = (layer.kernel_size[0] - 1) // 2 * layer.kernel_size[1] + (layer.kernel_size[1] - 1) // 2
        places = [place for place in range(window.shape[1]) if place != middle]
        window[:, places] = v
        # The middle tap of the own channel is in both: it is kept in the window.
        window[:, middle] = mix[outputs, own]
        mix[outputs, own] = 0
        layer.weight.copy_(window.view_as(layer.weight))
        layer.mix.copy_(mix[..., None, None])
        if self.offsets:
            offset = u[:, -1].flatten()
            if layer.bias is not None:
                layer.bias.copy_(offset)
            else:
                self.shift = offset
        left = self._left(*chosen)
        variance = sums["yy"] - sums["y"].square() / sums["n"] if self.offsets else sums["yy"]
        return float((left / variance.clamp_min(1e-30)).mean().sqrt())

    def _solve(self) -> tuple[Tensor, Tensor]:
        sums, layer = self.sums, self.layer
        channels = layer.mix.shape[1]
        diagonal = torch.diagonal(sums["cc"], dim1=1, dim2=2)
        power = diagonal[:, :channels].mean(1).clamp_min(torch.finfo(torch.float64).tiny)
        unknowns = channels + sums["ct"].shape[3]
        strength = enough(self.ridge, float(sums["n"]), unknowns)
        while True:
            penalty = (strength * power).unsqueeze(1).expand_as(diagonal).clone()
            penalty[:, channels:] = 0
            factor, failed = torch.linalg.cholesky_ex(sums["cc"] + torch.diag_embed(penalty))
            if not failed.any():
                break
            strength = max(strength, 1e-12) * 10
        self.note = ridge_note(self.ridge, strength, float(sums["n"]), unknowns)
        u = torch.cholesky_solve(sums["cy"], factor)  # (g, K, out)
        groups, per_group = sums["ct"].shape[:2]
        b = sums["ct"]  # (g, s, K, T)
        if b.shape[3] == 0:
            return u, b.new_zeros(groups * per_group, 0)
        eliminated = torch.cholesky_solve(b.permute(0, 2, 1, 3).flatten(2), factor)
        eliminated = eliminated.unflatten(2, (per_group, -1)).permute(0, 2, 1, 3)  # (g, s, K, T)
        tt = sums["tt"].unflatten(0, (groups, -1))
        schur = tt - b.mT @ eliminated
        schur = schur + torch.eye(b.shape[3]).to(b) * (strength * power).view(-1, 1, 1, 1)
        right = sums["ty"].unflatten(0, (groups, -1)) - (b.mT @ u[:, :, :per_group].mT.unsqueeze(3)).squeeze(3)
        v = torch.linalg.lstsq(schur, right.unsqueeze(3)).solution.squeeze(3)  # (g, s, T)
        correction = (eliminated @ v.unsqueeze(3)).squeeze(3)  # (g, s, K)
        u = u.clone()
        u[:, :, :per_group] -= correction.mT
        return u, v.flatten(0, 1)

    def _projection(self) -> tuple[Tensor, Tensor]:
        """The free values of the dense filters as they are, with the best offset for them."""
        layer, sums = self.layer, self.sums
        row, column = (layer.kernel_size[0] - 1) // 2, (layer.kernel_size[1] - 1) // 2
        filters = self.dense.double()
        u = filters[:, :, row, column].unflatten(0, (layer.groups, -1)).mT
        outputs, inputs = layer.shared()
        v = filters[outputs, inputs % layer.mix.shape[1]].flatten(1)
        middle = row * layer.kernel_size[1] + column
        v = torch.cat([v[:, :middle], v[:, middle + 1 :]], 1)
        if not self.offsets:
            return u, v
        ones = sums["cc"][:, -1, :-1]  # sums of the middle pixels
        explained = (u * ones.unsqueeze(2)).sum(1).flatten()
        explained[outputs] += (sums["ct"][:, :, -1].flatten(0, 1) * v).sum(1)
        offset = (sums["y"] - explained) / sums["n"]
        return torch.cat([u, offset.unflatten(0, (layer.groups, -1)).unsqueeze(1)], 1), v

    def _left(self, u: Tensor, v: Tensor) -> Tensor:
        """The sum of squared errors for each output."""
        sums = self.sums
        quadratic = (u * (sums["cc"] @ u)).sum(1).flatten()
        left = sums["yy"] - 2 * (u * sums["cy"]).sum(1).flatten() + quadratic
        outputs, _ = self.layer.shared()
        per_group = sums["ct"].shape[1]
        cross = (u[:, :, :per_group].mT.unsqueeze(3) * sums["ct"]).sum(2).flatten(0, 1)  # (S, T)
        left[outputs] += 2 * (cross * v).sum(1) - 2 * (v * sums["ty"]).sum(1)
        left[outputs] += (v * (sums["tt"] @ v.unsqueeze(2)).squeeze(2)).sum(1)
        return left.clamp_min(0)


def _rows(t: Tensor) -> Tensor:
    """(N, C, H, W) as (C, N·H·W)."""
    rows: Tensor = t.transpose(0, 1).flatten(1)
    return rows
