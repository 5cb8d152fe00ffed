"""Which pixels a perturbation layer looks at where a strided, padded or dilated convolution stood."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from convsurgery.geometry import ConvGeometry, Pair

__all__ = ["Grid"]


@dataclass(frozen=True)
class Axis:
    """One direction: output i pools the ``window`` pixels from ``start + i * stride``.

    A window of one pixel with a stride is no pooling: every ``step``-th pixel is taken before the mix.
    """

    start: int
    stride: int
    window: int

    @property
    def step(self) -> int:
        return self.stride if self.window == 1 else 1

    def length(self, outputs: int) -> int:
        """Pixels from the first to the last that are looked at, for so many outputs."""
        return (outputs - 1) * self.stride + self.window


def _axis(kernel: int, stride: int, dilation: int, before: int) -> Axis:
    """The pooling window is as wide as the stride, but no wider than the convolution's, and centred under it.

    Where that is half a pixel off, the choice that keeps nearer to the image's first pixel is taken. It never looks
    past what the convolution saw, so its padding is enough.
    """
    reach = dilation * (kernel - 1) + 1
    window = min(stride, reach)
    slack = reach - window
    start = min((slack // 2 - before, slack - slack // 2 - before), key=abs)
    return Axis(start, stride, window)


@dataclass(frozen=True)
class Grid:
    """The pixels behind each output pixel of a convolution of this geometry.

    Attributes:
        rows, columns: the two directions.
        mode: how what lies outside of the image is filled, the convolution's padding mode.
    """

    rows: Axis
    columns: Axis
    mode: str

    @classmethod
    def of(cls, geometry: ConvGeometry) -> Grid:
        left, _, top, _ = geometry.padding
        (kh, kw), (sh, sw), (dh, dw) = geometry.kernel_size, geometry.stride, geometry.dilation
        mode = "constant" if geometry.padding_mode in ("zeros", "same") else geometry.padding_mode
        return cls(_axis(kh, sh, dh, top), _axis(kw, sw, dw, left), mode)

    @property
    def window(self) -> Pair:
        """Pixels that are pooled to one, by rows and columns."""
        return self.rows.window, self.columns.window

    @property
    def stride(self) -> Pair:
        """Of the pooling; 1 where pixels are left out before."""
        return self.rows.stride // self.rows.step, self.columns.stride // self.columns.step

    def size(self, outputs: Pair) -> Pair:
        """Height and width of the map that is perturbed and mixed, for so many output rows and columns."""
        height, width = (
            (axis.length(count) - 1) // axis.step + 1
            for axis, count in zip((self.rows, self.columns), outputs, strict=True)
        )
        return height, width

    def cut(self, x: Tensor, outputs: Pair) -> Tensor:
        """That map's pixels of an image (..., H, W): padded, cropped and thinned out as needed."""
        pads: list[int] = []
        spans = []
        for axis, outs, size in zip((self.rows, self.columns), outputs, x.shape[-2:], strict=True):
            before, length = max(0, -axis.start), axis.length(outs)
            pads = [before, max(0, axis.start + length - size), *pads]
            spans.append((axis.start + before, length))
        if any(pads):
            x = F.pad(x, pads, self.mode)
        for dim, (axis, (start, length)) in enumerate(zip((self.rows, self.columns), spans, strict=True), start=-2):
            if start or length != x.shape[dim] or axis.step > 1:
                x = x.narrow(dim, start, length)
                if axis.step > 1:
                    x = x[..., :: axis.step, :] if dim == -2 else x[..., :: axis.step]
        return x
