"""Reaction-diffusion steps as targets of rules: in place of a residual block, or of one convolution on request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from convsurgery.errors import ArgumentError, ConversionError
from convsurgery.geometry import Block, Cost, Site
from convsurgery.operators.activations import ACTIVATIONS
from convsurgery.operators.base import Built, OperatorConfig, Start, option, register_operator
from convsurgery.operators.diffusion._onnx import REACTION_DIFFUSION
from convsurgery.operators.diffusion.layer import ReactionDiffusion2d
from convsurgery.operators.onnx import OnnxFunction

__all__ = ["RDCirculant", "RDExplicit", "RDImplicit"]


@dataclass(frozen=True)
class _Step(OperatorConfig):
    """What the three forms share."""

    source: ClassVar[str] = "Low-cost parameterizations"
    starts: ClassVar[dict[str, str]] = {"fit": "fitted", "random": "none"}
    patterns: ClassVar[tuple[str, ...]] = ("residual",)
    leaves_gain: ClassVar[bool] = False
    onnx: ClassVar[OnnxFunction] = REACTION_DIFFUSION
    form: ClassVar[str]

    step: float = option(0.1, "time step h", kind=float, above=0)
    learnable: bool = option(False, "whether h is trained", kind=bool)
    kernel: int = option(3, "height and width of the diffusion's kernel, odd", kind=int, least=1)
    pad: int = option(0, "pixels of zeros around the image, so that opposite edges do not meet", kind=int, least=0)
    act: str = option("relu", "activation, by timm's names", kind=(), choices=tuple(ACTIVATIONS))
    norm: str | None = option("batch", "normalisation of the reaction", kind=(), choices=("batch", None))
    residual: bool = option(True, "in place of a residual block; false: of one convolution", kind=bool)

    boundary: ClassVar[str] = "periodic"

    def validate(self) -> None:
        if self.kernel % 2 == 0:
            raise ArgumentError("kernel", f"the adjoint needs an odd kernel, not {self.kernel}")

    def takes(self) -> tuple[str, ...]:
        return self.patterns if self.residual else ()

    def refuses(self, site: Site) -> str | None:
        geometry = site.geometry
        if geometry.in_channels != geometry.out_channels or geometry.groups != 1:
            return f"{geometry}: a step keeps the number of channels and mixes all of them"
        if site.input_shape is None or site.output_shape is None:
            return "no forward call reaches it, so that the size of its images is not known"
        if site.input_shape[-2:] != site.output_shape[-2:]:
            return f"a step keeps the size of its images; here {_sizes(site.input_shape, site.output_shape)}"
        return self._too_small(site.input_shape)

    def refuses_block(self, block: Block, sites: Sequence[Site]) -> str | None:
        if block.projected:
            return "its shortcut is projected: a step adds to its input itself"
        if block.input_shape is None or block.input_shape != block.output_shape:
            return f"its input and output differ: {_sizes(block.input_shape, block.output_shape)}"
        return self._too_small(block.input_shape)

    def _too_small(self, shape: tuple[int, ...]) -> str | None:
        smallest = min(shape[-2:]) + 2 * self.pad
        if smallest >= self.kernel or self.boundary == "zeros":
            return None
        return f"images of {shape[-2]}x{shape[-1]} pixels are smaller than the kernel, {self.kernel}x{self.kernel}"

    def cost(self, site: Site) -> Cost:
        return self._cost(site.geometry.in_channels, site.positions)

    def block_cost(self, block: Block, sites: Sequence[Site]) -> Cost:
        shape = block.input_shape or (0, 0, 0, 0)
        return self._cost(shape[1], shape[-2] * shape[-1])

    def _cost(self, channels: int, pixels: int) -> Cost:
        """A Fourier transform of n values is counted as 5/2 · n · log₂ n multiply-accumulates."""
        taps = self.kernel**2 * channels
        affine = 2 * channels if self.norm else channels
        transformed = channels * pixels if self.form == "circulant" else pixels
        fourier = int(5 * channels * pixels * math.log2(max(2, transformed)))
        diffusion = 2 * taps * pixels if self.form == "explicit" else fourier
        return Cost(taps + channels**2 + affine + self.learnable, channels**2 * pixels + diffusion)

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        layer = self._layer(conv.in_channels, conv.weight, start).train(conv.training)
        layer.place = "" if site is None else site.label
        return Built(layer.requires_grad_(conv.weight.requires_grad))

    def build_block(self, module: nn.Module, block: Block, start: Start) -> Built:
        first = next((p for p in module.parameters() if p.is_floating_point()), None)
        if first is None or block.input_shape is None:
            raise ConversionError(f"{block.label} has no weights to take dtype and device from")
        layer = self._layer(block.input_shape[1], first, start).train(module.training)
        layer.place = block.label
        return Built(layer.requires_grad_(any(p.requires_grad for p in module.parameters())))

    def _layer(self, channels: int, like: torch.Tensor, start: Start) -> ReactionDiffusion2d:
        layer = ReactionDiffusion2d(
            channels,
            self.kernel,
            self.form,
            step=self.step,
            learnable=self.learnable,
            boundary=self.boundary,
            pad=self.pad,
            act=self.act,
            norm=self.norm or "none",
            residual=self.residual,
            device=like.device,
            dtype=like.dtype,
        )
        layer.reset_parameters(torch.Generator().manual_seed(int(start.value or 0) if start.name == "random" else 0))
        return layer


def _sizes(before: tuple[int, ...] | None, after: tuple[int, ...] | None) -> str:
    texts = ["unknown" if shape is None else "x".join(map(str, shape[1:])) for shape in (before, after)]
    return " and ".join(texts)


@register_operator("rd-explicit")
@dataclass(frozen=True)
class RDExplicit(_Step):
    """Explicit step as a rule's target: ``residual->rd-explicit(step=0.1, boundary=periodic)``."""

    summary: ClassVar[str] = "an explicit step of a reaction-diffusion equation"
    formula: ClassVar[str] = "y + h(−KᵀKy + σ(N(My)))"
    source: ClassVar[str] = "Low-cost parameterizations, eq. 9"
    form: ClassVar[str] = "explicit"

    boundary: str = option(  # type: ignore[misc]
        "periodic", "what the diffusion sees beyond the edges", kind=(), choices=("periodic", "zeros")
    )


@register_operator("rd-implicit")
@dataclass(frozen=True)
class RDImplicit(_Step):
    """Implicit step as a rule's target: ``residual->rd-implicit(step=0.1)``; periodic edges, but for ``pad``."""

    summary: ClassVar[str] = "an implicit step, solved by Fourier transform"
    formula: ClassVar[str] = "(I + hKᵀK)⁻¹(y + hσ(N(My)))"
    source: ClassVar[str] = "Low-cost parameterizations, eq. 11"
    form: ClassVar[str] = "implicit"


@register_operator("rd-circulant")
@dataclass(frozen=True)
class RDCirculant(_Step):
    """Circulant step as a rule's target: ``residual->rd-circulant(step=0.1)``; periodic edges, but for ``pad``."""

    summary: ClassVar[str] = "an explicit step whose diffusion couples channels in a circle"
    formula: ClassVar[str] = "y + h(−KᵀKy + σ(N(My))), K circulant"
    source: ClassVar[str] = "Low-cost parameterizations, eq. 12"
    form: ClassVar[str] = "circulant"
