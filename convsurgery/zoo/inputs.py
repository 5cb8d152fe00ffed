"""What a model's forward takes: an image for most, a list of images for detection, two for optical flow, a clip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.zoo.sizes import input_size

__all__ = ["example_inputs", "input_kind"]

#: frames of a clip: torchvision's video models were trained on 16 or more
FRAMES = 16
#: RAFT's weights were measured at this size; both sides must be multiples of 8, and no less than 128
FLOW_SIZE = (520, 960)


def example_inputs(
    model: nn.Module, *, batch: int = 1, size: tuple[int, int] | None = None, frames: int = FRAMES
) -> tuple[Any, ...]:
    """Zeros of the kind that ``model.forward`` takes, as positional arguments, in the model's dtype and on its device.

    Args:
        model: of torchvision's detection, video and optical flow models the kind is known; all others get a batch of
            images.
        batch: number of images, clips or pairs of images.
        size: height and width in pixels; the model's own by default.
        frames: length of a clip, for video models.

    Returns:
        ``(images,)`` with images (batch, C, H, W); ``([image, ...],)`` with images (C, H, W) for detection;
        ``(clips,)`` with clips (batch, C, frames, H, W) for video; ``(first, second)`` for optical flow.

    >>> from convsurgery.zoo import create_model
    >>> [tuple(x.shape) for x in example_inputs(create_model("torchvision/raft_small", device="meta"))]
    [(1, 3, 520, 960), (1, 3, 520, 960)]
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype, device = (torch.float32, torch.device("cpu")) if like is None else (like.dtype, like.device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    kind = input_kind(model)
    channels, height, width = input_size(model)
    if kind == "optical_flow":
        height, width = size or FLOW_SIZE
        return zeros(batch, 3, height, width), zeros(batch, 3, height, width)
    if kind == "detection":
        height, width = size or _detection_size(model) or (height, width)
        return ([zeros(channels, height, width) for _ in range(batch)],)
    height, width = size or (height, width)
    if kind == "video":
        return (zeros(batch, channels, frames, height, width),)
    return (zeros(batch, channels, height, width),)


def input_kind(model: nn.Module) -> str:
    """What a torchvision model is fed: "detection", "video" or "optical_flow"; "" for images, and for other models."""
    parts = type(model).__module__.split(".")
    kind = parts[2] if parts[:2] == ["torchvision", "models"] and len(parts) > 3 else ""
    # The backbones of detectors live there too, and take images.
    return kind if kind in ("video", "optical_flow") or (kind == "detection" and hasattr(model, "transform")) else ""


def _detection_size(model: nn.Module) -> tuple[int, int] | None:
    """The size that torchvision's detection models resize images to: what they then run on has no further border."""
    transform = getattr(model, "transform", None)
    fixed = getattr(transform, "fixed_size", None)
    if fixed:
        width, height = fixed
        return int(height), int(width)
    least = getattr(transform, "min_size", None)
    return (int(least[-1]), int(least[-1])) if least else None
