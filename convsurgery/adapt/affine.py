"""The closed-form fit of a per-channel affine behind an operator, on the convolution's own outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.errors import DataError
from convsurgery.graph import copy_model
from convsurgery.operators.kervolution import Kervolution2d

__all__ = ["fit_affine"]


class _Moments:
    """Streaming sums of two signals per channel, in float64."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        a, b = (t.detach().double().transpose(0, 1).flatten(1) for t in (x, y))
        sums = torch.stack([a.sum(1), b.sum(1), (a * a).sum(1), (a * b).sum(1), (b * b).sum(1)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += a.shape[1]

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gain and offset of the least-squares fit y ≈ gain·x + offset, and the share of y's variance left over."""
        assert self.sums is not None
        mean_x, mean_y, xx, xy, yy = self.sums / self.count
        var_x, var_y = xx - mean_x**2, yy - mean_y**2
        # A channel that does not vary says nothing about its gain.
        flat = var_x <= 1e-12 * xx
        gain = torch.where(flat, 1.0, (xy - mean_x * mean_y) / torch.where(flat, 1.0, var_x))
        left = (var_y - gain**2 * var_x).clamp_min(0) / var_y.clamp_min(1e-30)
        return gain, mean_y - gain * mean_x, torch.where(flat, 1.0, left)


def fit_affine(model: nn.Module, teacher: nn.Module, names: Iterable[str], batches: Any) -> dict[str, float]:
    """Fit ``gain`` and ``offset`` of each named operator to the output of the convolution it replaced.

    Layer by layer in the order given (execution order), so that a later layer is fitted to what the earlier ones now
    give. One streaming pass over ``batches`` for each layer; no activation is kept.

    Args:
        model: the converted model; changed in place.
        teacher: the original model, with convolutions of the same names.
        names: the operators to fit.
        batches: a tensor of images, or an iterable of such or of ``(images, targets)`` that can be gone through
            repeatedly, such as a DataLoader.

    Returns:
        For each layer the relative error that is left, the root of unexplained over total variance, channels averaged.

    Raises:
        DataError: when there is nothing to go through.
    """
    reference = copy_model(teacher).eval()
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return {name: _fit_one(model, reference, name, batches) for name in names}
    finally:
        for module, flag in training.items():
            module.training = flag


def _fit_one(model: nn.Module, reference: nn.Module, name: str, batches: Any) -> float:
    layer, conv = model.get_submodule(name), reference.get_submodule(name)
    assert isinstance(layer, Kervolution2d)
    layer.gain = layer.offset = None
    seen: dict[str, Tensor] = {}

    def keep(which: str, out: Tensor) -> None:
        seen[which] = out.detach().clone()  # the activation behind may work in place

    handles = [
        layer.register_forward_hook(lambda _, args, out: keep("new", out)),
        conv.register_forward_hook(lambda _, args, out: keep("old", out)),
    ]
    moments = _Moments()
    try:
        for images in _images(batches):
            device = layer.weight.device
            with torch.no_grad():
                model(images.to(device))
                reference(images.to(next(reference.parameters()).device))
            bias = layer.bias.detach() if layer.bias is not None else seen["new"].new_zeros(layer.out_channels)
            moments.add(seen["new"] - bias.view(-1, 1, 1), seen["old"])
    finally:
        for handle in handles:
            handle.remove()
    if not moments.count:
        raise DataError("the calibration data is empty")
    gain, offset, left = moments.solve()
    layer.gain = layer.constant(gain)
    bias_now = layer.bias.detach().double() if layer.bias is not None else 0
    layer.offset = layer.constant(offset - bias_now)
    return float(left.mean().sqrt())


def _images(batches: Any) -> Iterable[Tensor]:
    for batch in (batches,) if isinstance(batches, Tensor) else batches:
        yield batch if isinstance(batch, Tensor) else batch[0]
