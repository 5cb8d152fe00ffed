"""One reaction-diffusion step as a layer: diffusion, a 1x1 reaction, normalisation and activation."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from convsurgery.errors import ModelError
from convsurgery.operators.activations import ACTIVATIONS
from convsurgery.operators.base import Fitter
from convsurgery.operators.chunks import by_image, worth_chunking
from convsurgery.operators.diffusion.fitting import Reconstruction
from convsurgery.operators.diffusion.op import DENSE_CHANNELS, check, spectrum
from convsurgery.operators.layer import OperatorLayer
from convsurgery.operators.ridge import RIDGE

__all__ = ["ReactionDiffusion2d"]


class ReactionDiffusion2d(OperatorLayer):
    """A step ``y + h(−KᵀK y + σ(N(M y)))`` or its implicit or circulant form, in place of a residual block.

    *Low-Cost Parameterizations of Deep Convolutional Neural Networks*, eq. 9, 11 and 12. K is a depthwise convolution
    (or block circulant), M a 1x1 convolution, N a BatchNorm, h the time step. In eval mode the spectrum of the implicit
    and circulant forms is kept until weights, step, image size or dtype change.

    Args:
        channels: C.
        kernel_size: of K, odd.
        form: "explicit", "implicit" or "circulant".
        step: h > 0, or with ``learnable`` its first value.
        learnable: whether h is trained; it stays positive.
        boundary: "periodic", or "zeros" for the explicit form.
        pad: pixels of zeros put around the image and taken off again, so that opposite edges do not meet.
        act: σ, by timm's names.
        norm: "batch" or "none", which gives M a bias.
        residual: whether y itself is part of the output; without it the step takes the place of one convolution.

    Shapes:
        (N, C, H, W) to the same.

    Example:
        >>> import torch
        >>> ReactionDiffusion2d(8, form="implicit").eval()(torch.randn(2, 8, 12, 10)).shape
        torch.Size([2, 8, 12, 10])
    """

    step: Tensor | None

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        form: str = "explicit",
        *,
        step: float = 0.1,
        learnable: bool = False,
        boundary: str = "periodic",
        pad: int = 0,
        act: str = "relu",
        norm: str = "batch",
        residual: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(form, boundary, (kernel_size, kernel_size))
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(sorted(ACTIVATIONS))}, not {act!r}")
        if norm not in ("batch", "none"):
            raise ValueError(f"norm must be batch or none, not {norm!r}")
        if not step > 0 or not math.isfinite(step):
            raise ValueError(f"step must be above 0, not {step}")
        if pad < 0:
            raise ValueError(f"pad must not be below 0, not {pad}")
        options: Any = {"device": device, "dtype": dtype}
        self.channels, self.form, self.boundary, self.pad = channels, form, boundary, pad
        self.act, self.residual = act, residual
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size, **options))
        self.mix = nn.Conv2d(channels, channels, 1, bias=norm == "none", **options)
        self.norm = nn.BatchNorm2d(channels, **options) if norm == "batch" else nn.Identity()
        value = torch.tensor(step, dtype=torch.promote_types(self.weight.dtype, torch.float32), device=device)
        if learnable:
            self.log_step = nn.Parameter(value.log())
            self.register_buffer("step", None)
        else:
            self.register_buffer("step", value)
        #: where it stands in a model, for errors
        self.place = ""
        self._kept: tuple[tuple[object, ...], Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw M as torch draws a 1x1 convolution, and K so that one explicit step of h = 1 is stable."""
        taps = math.prod(self.weight.shape[2:]) * (self.channels if self.form == "circulant" else 1)
        bound = 1 / math.sqrt(self.channels)
        for parameter, limit in ((self.weight, 1 / taps), (self.mix.weight, bound), (self.mix.bias, bound)):
            if parameter is not None and not parameter.is_meta:
                with torch.no_grad():
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-limit, limit, generator=generator))

    def time_step(self) -> Tensor:
        """h, ()."""
        return self.log_step.clamp(-30, 30).exp() if self.step is None else self.step

    def reaction(self, input: Tensor) -> Tensor:
        """σ(N(M y)), of the shape of the input."""
        return ACTIVATIONS[self.act].function(self.norm(self.mix(input)))

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        if input.shape[0] > 1 and not self.training and worth_chunking(input, self.weight):
            return by_image(self._advance, input)
        return self._advance(input)

    def _advance(self, input: Tensor) -> Tensor:
        reaction, y = self.reaction(input), input
        if self.pad:
            y, reaction = (F.pad(t, [self.pad] * 4) for t in (y, reaction))
        h, form = self.time_step(), (self.form, self.boundary, self.residual)
        out: Tensor = torch.ops.convsurgery.reaction_diffusion2d(y, reaction, self.weight, h, self._factors(y), *form)
        return out[..., self.pad : -self.pad, self.pad : -self.pad] if self.pad else out

    def _factors(self, y: Tensor) -> Tensor | None:
        """The spectrum in eval mode, made anew only when something it depends on has changed."""
        spectral = self.form == "implicit" or (self.form == "circulant" and self.channels > DENSE_CHANNELS)
        plain = type(self.weight) is nn.Parameter and type(y) is Tensor
        if not spectral or self.training or torch.compiler.is_compiling() or not plain or torch.is_grad_enabled():
            return None
        size, h = (int(y.shape[-2]), int(y.shape[-1])), self.time_step()
        weight = self.weight
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device, float(h), size)
        # Looked at once: another thread may keep the spectrum of another size meanwhile.
        kept = self._kept
        if kept is None or kept[0] != key:
            if size[0] < weight.shape[-2] or size[1] < weight.shape[-1]:
                return None  # the op says what is wrong
            factors = spectrum(weight.detach(), h.detach(), size, self.form)
            if not bool(torch.isfinite(factors).all()):
                where = self.place or f"an {self.form} step over {self.channels} channels"
                raise ModelError(f"the spectrum of {where} is not finite: its weights or its h are out of range")
            self._kept = kept = (key, factors)
        return kept[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}

    def fitter(self, conv: nn.Module, ridge: float | None = None, *, shift: bool = False) -> Fitter:
        """Fits the step to what stood in its place; see ``convsurgery.operators.diffusion.fitting``."""
        return Reconstruction(self, RIDGE if ridge is None else ridge)

    def fold(self) -> Self:
        """With the BatchNorm folded into M; for eval mode."""
        from convsurgery.operators.fused import batchnorm_affine

        folded = copy.deepcopy(self)
        if isinstance(self.norm, nn.BatchNorm2d):
            gain, bias = batchnorm_affine(self.norm)
            mix = nn.Conv2d(self.channels, self.channels, 1, device="meta")
            weight = self.mix.weight.detach().double() * gain.view(-1, 1, 1, 1)
            mix.weight, mix.bias = nn.Parameter(weight.to(self.weight)), nn.Parameter(bias.to(self.weight))
            folded.mix, folded.norm = mix, nn.Identity()
        if self.step is None:
            del folded.log_step
            folded.step = self.time_step().detach().clone()
        return folded.requires_grad_(False)

    def extra_repr(self) -> str:
        kernel = self.weight.shape[-1]
        step = "meta" if self.weight.is_meta else f"{float(self.time_step().detach()):.4g}"
        learned = ", learnable" if self.step is None else ""
        text = f"{self.channels}, {self.form}, kernel_size={kernel}, step={step}{learned}, act={self.act}"
        text += f", boundary={self.boundary}" + (f", pad={self.pad}" if self.pad else "")
        return text + ("" if self.residual else ", residual=False")
