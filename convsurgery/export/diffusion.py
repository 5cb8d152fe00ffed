"""Implicit reaction-diffusion steps with a truncated kernel in place of the exact solve."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.errors import ExportError
from convsurgery.operators.diffusion import ReactionDiffusion2d
from convsurgery.operators.diffusion.op import spectrum

__all__ = ["parse_diffusion", "truncate"]


def parse_diffusion(text: str) -> float | None:
    """``matmul`` (None), or the bound of ``truncate:1e-3``.

    Raises:
        ExportError: for anything else.
    """
    if text == "matmul":
        return None
    found = re.fullmatch(r"truncate:(.+)", text)
    try:
        bound = float(found[1]) if found else 0.0
    except ValueError:
        bound = 0.0
    if not 0 < bound < 1:
        raise ExportError(f"diffusion must be matmul, or truncate:BOUND with a bound from 0 to 1, not {text!r}")
    return bound


class TruncatedDiffusion2d(nn.Module):
    """An implicit step solved by a depthwise circular convolution with the middle of its impulse response."""

    kernel: Tensor
    h: Tensor

    def __init__(self, step: ReactionDiffusion2d, kernel: Tensor) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("kernel", kernel)
        self.register_buffer("h", step.time_step().detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        step, pad = self.step, self.step.pad
        pushed = self.h * step.reaction(input)
        wanted = input + pushed if step.residual else pushed
        kernel = self.kernel
        radius = kernel.shape[-1] // 2
        if pad:
            wanted = F.pad(wanted, [pad] * 4)
        rows = torch.cat([wanted[:, :, wanted.shape[2] - radius :], wanted, wanted[:, :, :radius]], 2)
        around = torch.cat([rows[..., rows.shape[3] - radius :], rows, rows[..., :radius]], 3)
        out = F.conv2d(around, kernel, groups=kernel.shape[0])
        return out[..., pad : out.shape[2] - pad, pad : out.shape[3] - pad] if pad else out


def truncate(model: nn.Module, inputs: tuple[Tensor, ...], bound: float) -> dict[str, dict[str, Any]]:
    """Replace every implicit step of ``model`` by the smallest truncated one whose error is within ``bound``.

    What is cut off of the impulse response g bounds the error: no output differs by more than Σ|g outside| times the
    largest value that is solved for. The smallest window for which that sum is at most ``bound`` in all channels is
    taken.

    Returns:
        For each layer by name its window's size and its bound; empty where there is no implicit step.
    """
    sizes: dict[str, tuple[int, int]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, ReactionDiffusion2d) and module.form == "implicit":

            def note(layer: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                pad = int(layer.pad)  # type: ignore[arg-type]
                sizes[name] = (int(args[0].shape[-2]) + 2 * pad, int(args[0].shape[-1]) + 2 * pad)

            handles.append(module.register_forward_pre_hook(note))
    try:
        if handles:
            with torch.no_grad():
                model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    made: dict[str, dict[str, Any]] = {}
    for name, size in sizes.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, ReactionDiffusion2d)
        kernel, left = _window(layer, size, bound)
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = TruncatedDiffusion2d(layer, kernel)
        made[name] = {"window": kernel.shape[-1], "bound": left}
    return made


def _window(layer: ReactionDiffusion2d, size: tuple[int, int], bound: float) -> tuple[Tensor, float]:
    """The middle of the impulse response, (C, 1, 2r + 1, 2r + 1), and Σ|g| of what is outside of it."""
    step = layer.time_step().detach().double()
    factors = spectrum(layer.weight.detach().double(), step, size, "implicit")
    response = torch.fft.fftshift(torch.fft.irfft2(factors, s=size), dim=(-2, -1))
    middle, total = (size[0] // 2, size[1] // 2), response.abs().sum((-2, -1))
    largest = (min(size) - 1) // 2
    for radius in range(largest + 1):
        rows, columns = (slice(m - radius, m + radius + 1) for m in middle)
        inside = response[:, rows, columns]
        left = float((total - inside.abs().sum((-2, -1))).max().clamp_min(0))
        if left <= bound or radius == largest:
            if left > bound:
                raise ExportError(
                    f"no window within images of {size[0]}x{size[1]} pixels comes within {bound:g}: the response "
                    f"reaches everywhere, {left:.2g} is outside of the largest. Export with diffusion='matmul'"
                )
            # Correlation wants the kernel as it is seen from the output; the response is symmetric.
            return inside.unsqueeze(1).to(layer.weight.dtype).contiguous(), left
    raise AssertionError
