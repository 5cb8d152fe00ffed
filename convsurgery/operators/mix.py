"""What operators share that end in a learned 1x1 mix of fixed features, and the best mix on data."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from typing_extensions import Self

from convsurgery.operators.layer import OperatorLayer
from convsurgery.operators.moments import Moments
from convsurgery.operators.ridge import NormalEquations

__all__ = ["MixFit", "MixLayer"]


class MixLayer(OperatorLayer):
    """A layer whose output is ``weight`` (C_out, K, 1, 1) times features of its input, by groups, plus ``bias``."""

    bias: Tensor | None
    groups: int

    def features(self, input: Tensor) -> Tensor:
        """What the mix combines, (N, groups · K, H', W') at the size of the output."""
        raise NotImplementedError

    def fold(self) -> Self:
        folded = copy.copy(self)
        folded._parameters, folded._buffers = {}, dict(self._buffers)
        for name, parameter in self._parameters.items():
            if name in ("weight", "bias"):
                kept = None if parameter is None else nn.Parameter(parameter.detach().clone(), requires_grad=False)
                folded._parameters[name] = kept
            else:
                folded._buffers[name] = None if parameter is None else parameter.detach().clone()
        return folded

    def absorb_affine(self, gain: Tensor, bias: Tensor) -> bool:
        old = 0 if self.bias is None else self.bias.detach().double()
        weight = self.weight.detach().double() * gain.double().view(-1, 1, 1, 1)
        total = gain.double() * old + bias.double()
        self.weight = nn.Parameter(weight.to(self.weight), requires_grad=False)
        self.bias = nn.Parameter(total.to(self.weight), requires_grad=False)
        return True


class MixFit:
    """Ridge least squares of a layer's ``weight`` and ``bias``; PNN paper, eq. 8.

    Args:
        layer: the layer; its mix is changed in place.
        ridge: strength of the penalty, relative to the mean power of the features.
        shift: whether an offset may be left over where the layer has no bias.
        rescale: whether the layer is not quite linear (a maximum is taken behind the mix): gain and offset of its real
            output are then fitted in a second pass.
    """

    local = False

    def __init__(self, layer: MixLayer, ridge: float, *, shift: bool, rescale: bool = False) -> None:
        self.layer, self.ridge, self.rescale = layer, ridge, rescale
        self.offsets = shift or layer.bias is not None
        features = layer.weight.shape[1]
        self.equations: NormalEquations | None = NormalEquations(layer.groups, features, bias=self.offsets)
        self.moments = Moments()
        self.shift: Tensor | None = None
        self.note = ""

    def add(self, input: Tensor, output: Tensor, target: Tensor) -> None:
        if self.equations is not None:
            self.equations.add(self.layer.features(input), target)
        else:
            self.moments.add(output, target)

    @torch.no_grad()
    def finish(self) -> float | None:
        if self.equations is not None:
            weight, offset, error = self.equations.solve(self.ridge)
            self.note = self.equations.note
            self.equations = None
            self.layer.weight.copy_(weight.view_as(self.layer.weight))
            if offset is not None:
                self._offset(offset)
            return None if self.rescale else error
        gain, _ = self.moments.affine() if self.offsets else (self.moments.gain(), None)
        # Behind a maximum only positive gains can be folded into the mix.
        gain = torch.where(gain > 0, gain, 1.0)
        self.layer.weight.copy_(self.layer.weight.double() * gain.view(-1, 1, 1, 1))
        if not self.offsets:
            return self.moments.error(gain)
        offset = self.moments.offset(gain)
        self._offset(offset, gain)
        return self.moments.error(gain, offset)

    def _offset(self, offset: Tensor, gain: Tensor | float = 0.0) -> None:
        if self.layer.bias is not None:
            self.layer.bias.copy_(self.layer.bias.double() * gain + offset)
        else:
            self.shift = offset
