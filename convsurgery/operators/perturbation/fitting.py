"""The perturbation layer's start from data: the linear range of its masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convsurgery.operators.moments import Moments

if TYPE_CHECKING:
    from convsurgery.operators.perturbation.layer import Perturbation2d

__all__ = ["LinearRange"]


class LinearRange:
    """Moves the masks of a centred relu layer so far that no value seen is clipped; a second pass measures the error.

    The noise stays, and the kink comes to lie just below the smallest value of each channel.
    """

    local = False

    def __init__(self, layer: Perturbation2d) -> None:
        self.layer, self.note = layer, ""
        self.shift: Tensor | None = None
        self.lowest: Tensor | None = None
        self.moments: Moments | None = None

    def add(self, input: Tensor, output: Tensor, target: Tensor) -> None:
        if self.moments is not None:
            self.moments.add(output, target)
            return
        x = self.layer.grid.cut(input.detach(), (target.shape[-2], target.shape[-1]))
        lowest = x.transpose(0, 1).flatten(1).amin(1)
        self.lowest = lowest if self.lowest is None else torch.minimum(self.lowest, lowest)

    def finish(self) -> float | None:
        if self.moments is not None:
            return self.moments.error()
        masks, lowest = self.layer.masks, self.lowest
        if masks is not None and lowest is not None:
            needed = (-lowest).clamp_min(0)
            needed = needed.max().view(1, 1, 1, 1) if masks.shape[0] == 1 else needed.view(-1, 1, 1, 1)
            with torch.no_grad():
                masks += needed - masks.amin((1, 2, 3), keepdim=True)
                masks.clamp_(min=needed.to(masks))  # what rounding took away
        self.moments = Moments()
        return None
