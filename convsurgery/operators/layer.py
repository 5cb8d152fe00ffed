"""What the engine asks of every layer that took a convolution's place."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Self

from convsurgery.operators.base import Fitter

__all__ = ["OperatorLayer"]


class OperatorLayer(nn.Module):
    """Base of the layers that operators build; gives ``fuse``, export and calibration something to call."""

    def fuse(self) -> Self:
        """A copy for deployment: constants folded, nothing learnable, the same function up to rounding."""
        raise NotImplementedError

    def absorb_affine(self, gain: Tensor, bias: Tensor) -> bool:
        """Follow this layer by ``gain · y + bias`` (both (C_out,)), folded into its weights.

        Returns:
            False where the layer cannot; it is then as before. Must not depend on values, but on the layer's kind.
        """
        return False

    def prepared(self, input: Tensor) -> Tensor:
        """What this layer works on where a convolution that pads its own input stood; else the input itself."""
        return input

    def fitter(self, conv: nn.Conv2d, ridge: float | None = None, *, shift: bool = False) -> Fitter | None:
        """What fits this layer to the outputs of ``conv``; None for a layer without a closed form.

        Args:
            conv: the convolution it replaced, in the original model.
            ridge: strength of the penalty on the weights, relative to the mean power of the features; None for the
                layer's own.
            shift: whether a BatchNorm behind can take what a layer without a bias cannot hold: the fitter's ``shift``,
                (C_out,), is then to be added to the layer's output.
        """
        return None
