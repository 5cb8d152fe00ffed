"""The perturbation layer, with the geometry of the convolution whose place it takes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.errors import ModelError
from convsurgery.geometry import Pair, pair
from convsurgery.operators import noise as random
from convsurgery.operators.activations import ACTIVATIONS
from convsurgery.operators.base import Fitter
from convsurgery.operators.mix import MixFit, MixLayer
from convsurgery.operators.perturbation.fitting import LinearRange
from convsurgery.operators.perturbation.grid import Grid
from convsurgery.operators.ridge import RIDGE

__all__ = ["Perturbation2d"]

NOISES = ("uniform", "gaussian", "none")


class Perturbation2d(MixLayer):
    """Perturbation layer: ``y_t = Σ_i V_ti · act(N_i + x_i) + b_t``, N fixed noise and V a learned 1x1 mix.

    Juefei-Xu et al., *Perturbative Neural Networks* (2018), eq. 2. ``kernel_size``, ``padding`` and ``dilation`` only
    place the output as a convolution's: every output sees one pixel, or with a stride the pixels of its pooling window.

    Args:
        in_channels, out_channels: as for :class:`torch.nn.Conv2d`.
        image_size: height and width of the input, in pixels; masks have a value for each.
        kernel_size, stride, padding, dilation, groups, bias, padding_mode: as for :class:`torch.nn.Conv2d`. A stride
            up to the kernel's size pools behind the mix; where the kernel has one pixel, the others are left out.
        fanout: masks for each channel, m.
        level: half the width of the uniform noise, or the standard deviation of the Gaussian.
        noise: "uniform", "gaussian" or "none".
        seed: of the noise; the same on every device and platform.
        act: activation, by timm's names.
        shared: one set of masks for all channels.
        trainable: whether the masks are parameters.
        pool: "max" or "avg".
        resize: whether masks are stretched to images of another size (each pixel takes the value of the nearest place);
            otherwise such images are refused.
        centered: whether the mask is taken out again behind the activation; see ``functional.perturbation``.
        stream: name that gives layers of one seed masks of their own.

    Shapes:
        input (N, C_in, H, W) or (C_in, H, W); output as :class:`torch.nn.Conv2d` gives it.

    Example:
        >>> import torch
        >>> Perturbation2d(3, 8, 16, kernel_size=3, padding=1, stride=2)(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 8, 8, 8])
    """

    masks: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int | Pair,
        kernel_size: int | Pair = 1,
        stride: int | Pair = 1,
        padding: str | int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        fanout: int = 1,
        level: float = 0.1,
        noise: str = "uniform",
        seed: int = 0,
        act: str = "relu",
        shared: bool = False,
        trainable: bool = False,
        pool: str = "max",
        resize: bool = True,
        centered: bool = False,
        stream: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.take_options(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        for name, value, known in (("noise", noise, NOISES), ("pool", pool, ("max", "avg")), ("act", act, ACTIVATIONS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(sorted(known))}, not {value!r}")
        if fanout < 1 or not level > 0:
            raise ValueError(f"fanout must be at least 1 and level above 0, not {fanout} and {level}")
        self.grid = Grid.of(self.geometry)
        self.fanout, self.level, self.noise, self.seed, self.act = fanout, level, noise, seed, act
        self.shared, self.pool, self.resize, self.centered, self.stream = shared, pool, resize, centered, stream
        mixed = in_channels // groups * fanout
        self.weight = nn.Parameter(torch.empty(out_channels, mixed, 1, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.set_masks(self.grid.size(self.geometry.output_size(*pair(image_size))), trainable)
        self.reset_parameters()

    def set_masks(self, size: Pair, trainable: bool = False) -> None:
        """Draw the masks for maps of ``size``: as they are seen by the mix, after padding and leaving out pixels."""
        self._buffers.pop("masks", None)
        self._parameters.pop("masks", None)
        masks = None
        if self.noise != "none":
            shape = (1 if self.shared else self.in_channels, self.fanout, *size)
            if self.weight.is_meta:
                masks = torch.empty(shape, device="meta", dtype=self.weight.dtype)
            else:
                draw = random.uniform if self.noise == "uniform" else random.gaussian
                masks = (draw(shape, self.seed, self.stream) * self.level).to(self.weight)
        if trainable and masks is not None:
            self.masks = nn.Parameter(masks, requires_grad=self.weight.requires_grad)
        else:
            self.register_buffer("masks", masks)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw mix and bias as :class:`torch.nn.Conv2d` draws those of a 1x1 convolution."""
        bound = 1 / math.sqrt(max(1, self.weight.shape[1]))
        for parameter in (self.weight, self.bias):
            if parameter is not None and not parameter.is_meta:
                with torch.no_grad():
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    @property
    def pools(self) -> bool:
        """Whether several mixed pixels become one."""
        return self.grid.window != (1, 1)

    def forward(self, input: Tensor) -> Tensor:
        x = self.grid.cut(input, self._outputs(input))
        pool = self.pool if self.pools else "none"
        out: Tensor = torch.ops.convsurgery.perturbation2d(
            x,
            self.weight,
            self.bias,
            self._masks_for(x),
            self.fanout,
            self.act,
            self.centered,
            pool,
            self.grid.window,
            self.grid.stride if self.pools else (1, 1),
            self.groups,
        )
        return out

    def _outputs(self, input: Tensor) -> Pair:
        if isinstance(input, torch.fx.Proxy):
            raise ModelError("FX must keep a Perturbation2d whole: it cannot follow the sizes that its masks need")
        height, width = self.geometry.output_size(*input.shape[-2:])
        if height < 1 or width < 1:
            raise ModelError(
                f"an image of size {tuple(input.shape[-2:])} is smaller than the window of {self.geometry}"
            )
        return height, width

    def _masks_for(self, x: Tensor) -> Tensor | None:
        if self.masks is None or self.masks.shape[-2:] == x.shape[-2:]:
            return self.masks
        if not self.resize:
            raise ModelError(
                f"the masks are fixed to maps of {tuple(self.masks.shape[-2:])} pixels, here are "
                f"{tuple(x.shape[-2:])}; masks=resize would stretch them"
            )
        return F.interpolate(self.masks, x.shape[-2:], mode="nearest-exact")

    # -- what the engine asks

    def features(self, input: Tensor) -> Tensor:
        """As above, pooled by the mean."""
        with torch.no_grad():
            x = self.grid.cut(input, self._outputs(input))
            masks = self._masks_for(x)
            z = x.unsqueeze(2) if masks is None else x.unsqueeze(2) + masks
            a = ACTIVATIONS[self.act].function(z)
            if self.centered and masks is not None:
                a = torch.maximum(x.unsqueeze(2), -masks) if self.act == "relu" else a - masks
            a = a.flatten(1, 2)
            return F.avg_pool2d(a, self.grid.window, self.grid.stride) if self.pools else a

    def fitter(self, conv: nn.Conv2d, ridge: float | None = None, *, shift: bool = False) -> Fitter | None:
        if self.centered:
            return LinearRange(self)
        pooled = self.pools and self.pool == "max"
        return MixFit(self, RIDGE if ridge is None else ridge, shift=shift, rescale=pooled)

    def absorb_affine(self, gain: Tensor, bias: Tensor) -> bool:
        if self.pools and self.pool == "max":  # a negative gain would turn the maximum into a minimum
            return False
        return super().absorb_affine(gain, bias)

    def extra_repr(self) -> str:
        masks: Any = "no" if self.masks is None else f"{self.fanout} x {tuple(self.masks.shape[-2:])}"
        text = f"{self.geometry}, masks={masks}, {self.noise} {self.level:g}, act={self.act}"
        if self.pools:
            text += f", {self.pool} pooling of {self.grid.window}"
        for name in ("shared", "centered"):
            text += f", {name}" if getattr(self, name) else ""
        return text
