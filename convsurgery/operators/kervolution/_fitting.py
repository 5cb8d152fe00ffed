"""Fits of a kervolution's constants to the convolution: gain and offset, and for a neutral start ε."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convsurgery.operators.moments import Moments

if TYPE_CHECKING:
    from convsurgery.operators.kervolution._dialled import Dialled
    from convsurgery.operators.kervolution._layer import Kervolution2d

__all__ = ["TARGET", "AffineFit", "DialFit", "NeutralFit", "ScaleFit"]

#: relative error that a layer may have when data choose its ε
TARGET = 1e-3

#: the images of the first batch that narrow ε down
_IMAGES = 8

#: how near to the least error of all ε a layer must come whose dtype cannot meet the target
_NEAR = 1.1


class AffineFit:
    """Gain and offset of each channel, on the convolution's own outputs.

    Args:
        layer: its constants are changed in place.

    Attributes:
        matched: give the output the mean and variance that the convolution's has, as training from there wants it;
            else the least squares, which shrink what goes badly together.
    """

    local = False

    def __init__(self, layer: Kervolution2d) -> None:
        self.matched = False
        self.layer, self.moments = layer, Moments()
        self.shift: Tensor | None = None
        self.note = ""
        layer.gain = layer.offset = None

    def add(self, input: Tensor, output: Tensor, target: Tensor) -> None:
        bias = self.layer.bias
        self.moments.add(output if bias is None else output - bias.detach().view(-1, 1, 1), target)

    def finish(self) -> float:
        layer = self.layer
        gain, offset = self.moments.matched() if self.matched else self.moments.affine()
        layer.gain = layer.constant(gain)
        layer.offset = layer.constant(offset - (0 if layer.bias is None else layer.bias.detach().double()))
        return self.moments.error(gain, offset)


class ScaleFit:
    """The scale of the filters at which the kernel goes best with the convolution, then gain and offset.

    For distances: filters much smaller than the input leave of ‖x − aw‖₁ little but ‖x‖₁, alike for all channels.
    Powers of two around the ratio of their sizes are tried on a few images; the best is measured on all.
    """

    local = False

    def __init__(self, layer: Kervolution2d) -> None:
        self.layer, self.affine = layer, AffineFit(layer)
        self.shift: Tensor | None = None
        self.note = ""
        self.found: float | None = None

    @property
    def matched(self) -> bool:
        """As :class:`AffineFit` has it."""
        return self.affine.matched

    @matched.setter
    def matched(self, value: bool) -> None:
        self.affine.matched = value

    def add(self, input: Tensor, output: Tensor, target: Tensor) -> None:
        if self.found is None:
            few, layer = input[:_IMAGES], self.layer
            ratio = few.detach().float().square().mean() / layer.weight.detach().float().square().mean().clamp_min(
                1e-30
            )
            middle = round(math.log2(max(float(ratio.sqrt()), 2.0**-20)))
            errors = {}
            for scale in (2.0 ** (middle + k) for k in range(-2, 9)):
                layer.scale = layer.constant(scale)
                moments = Moments()
                moments.add(layer(few), target[:_IMAGES])
                errors[scale] = moments.error(*moments.affine())
            self.found = min(errors, key=lambda each: errors[each])
            layer.scale = layer.constant(self.found)
            self.note = f"filters times {self.found:g}"
        self.affine.add(input, self.layer(input), target)

    def finish(self) -> float:
        return self.affine.finish()


class NeutralFit:
    """The largest ε whose error meets a target, with gain and offset of each channel by least squares.

    For layers whose filters are scaled, as models have them that convsurgery 0.1 saved.

    All powers of two are tried on a few images, and the few around the best on all of them. Where no ε meets the
    target, in half precision above all, the largest is taken whose error is near the least.

    Args:
        layer: begun by neutral; its constants are changed in place.
        absorb: whether a BatchNorm behind can take gain and offset: they are then left in ``residual`` and ``shift``.

    Attributes:
        target: relative error to meet.
        residual: the layer gives residual · (what it should), (C_out,); None where the gains are its own.
    """

    #: the layer is compared with its convolution on the layer's own input: what came before is not its error
    local = True
    #: among which ε is looked for
    candidates: tuple[float, ...] = tuple(2.0**-k for k in range(1, 33))

    def __init__(self, layer: Kervolution2d, *, absorb: bool) -> None:
        self.layer, self.target, self.absorb = layer, TARGET, absorb
        self.shift: Tensor | None = None
        self.residual: Tensor | None = None
        self.note = ""
        assert layer.eps is not None
        self.free = bool(getattr(layer, "free_eps", False))
        self.tried: list[float] | None = None if self.free else [float(layer.eps.detach().amax())]
        self.moments: dict[float, Moments] = {}
        layer.offset = None

    def add(self, input: Tensor, output: Tensor, target: Tensor) -> None:
        if self.tried is None:
            self.tried = self._near(input[:_IMAGES], target[:_IMAGES])
        for eps in self.tried:
            self._add(eps, self.moments.setdefault(eps, Moments()), input, target)

    def _near(self, input: Tensor, target: Tensor) -> list[float]:
        """The largest ε that will do for a few images, and its neighbours."""
        few = {eps: Moments() for eps in self.candidates}
        for eps, moments in few.items():
            self._add(eps, moments, input, target)
        best = self._choice(few)
        return [eps for eps in few if best / 4 <= eps <= best * 2 or eps == 0]

    def _add(self, eps: float, moments: Moments, input: Tensor, target: Tensor) -> None:
        layer = self.layer
        bias = layer.bias
        self._turn(eps)
        output = layer(input)
        moments.add(
            *((output, target) if bias is None else (t - bias.detach().view(-1, 1, 1) for t in (output, target)))
        )

    def _turn(self, eps: float) -> None:
        self.layer.gain = self.layer.constant(self.layer.neutral(eps))

    def _choice(self, moments: dict[float, Moments]) -> float:
        errors = {eps: found.error(*found.affine()) for eps, found in moments.items()}
        usable = {eps: error for eps, error in errors.items() if error == error}
        if not usable:
            return min(errors)
        bound = max(self.target, _NEAR * min(usable.values()))
        return max(eps for eps, error in usable.items() if error <= bound)

    @torch.no_grad()
    def finish(self) -> float | None:
        layer = self.layer
        eps = self._choice(self.moments)
        gain, offset = self.moments[eps].affine()
        error = self.moments[eps].error(gain, offset)
        bare = layer.neutral(eps).to(gain.device)
        layer.eps, total = layer.constant(eps), bare * gain
        if self.absorb and layer.bias is None:
            self.residual = layer.take_gain(total)
            if self.residual is not None:
                self.shift = offset
                return self._done(eps, error)
        layer.gain = layer.constant(total)
        layer.offset = layer.constant(offset)
        return self._done(eps, error)

    def _done(self, eps: float, error: float) -> float:
        self.note = f"ε = {eps:.1e}"
        if self.free and error > self.target:
            self.note += f", the least error of {self.layer.weight.dtype} here".replace("torch.", "")
        return error


class DialFit(NeutralFit):
    """The same for layers of today: ε stands beside the filters, and 0, the convolution itself, is one of those tried.

    Gain and offset stay in the layer.
    """

    layer: Dialled
    #: down to where activations of 1e9 still allow one
    candidates = (*(2.0**-k for k in range(1, 49)), 0.0)

    def __init__(self, layer: Dialled) -> None:
        super().__init__(layer, absorb=False)

    def _turn(self, eps: float) -> None:
        self.layer.eps, self.layer.gain = self.layer.constant(eps), None

    @torch.no_grad()
    def finish(self) -> float | None:
        layer, eps = self.layer, self._choice(self.moments)
        least = min(self.moments, key=lambda each: each or 1.0)
        if self.free and eps == 0 and self.candidates[-2] < least:
            # Images behind the first few want a smaller one.
            self.tried, self.moments = [*(least / 2.0**k for k in range(1, 5)), 0.0], {}
            return None
        moments = self.moments[eps]
        layer.eps, self.note = layer.constant(eps), f"ε = {eps:.1e}"
        if eps == 0 and moments.error() == 0:
            layer.gain = layer.offset = None
            return 0.0
        gain, offset = moments.affine()
        layer.gain, layer.offset = layer.constant(gain), layer.constant(offset)
        return moments.error(gain, offset)
