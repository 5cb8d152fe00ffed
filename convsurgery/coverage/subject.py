"""Building architectures for a sweep: fast, and on inputs as small as they take."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from convsurgery import zoo
from convsurgery.errors import ModelError
from convsurgery.plain import declared

__all__ = ["FastInit", "build", "family_of", "normalised", "pictures", "smallest_inputs"]

_LADDER = (32, 64, 96, 128, 160, 192, 224, 256)
#: Models with BatchNorm get no less: maps of one pixel have no variance to normalise by.
_LEAST_NORMALISED = 128
#: sizes that models bound to one are built for instead, where they can be
_BOUND_LADDER = (56, 64, 96, 112, 128, 168, 196)
LARGE = 200_000_000


def family_of(name: str) -> str:
    """The module that defines an architecture: "resnet", "torchvision/detection"."""
    if name.startswith("torchvision/"):
        from torchvision.models import get_model_builder

        parts = get_model_builder(name.removeprefix("torchvision/")).__module__.split(".")[2:]
        return f"torchvision/{parts[0]}"
    from timm.models import model_entrypoint

    module: str = model_entrypoint(name.partition(".")[0]).__module__
    return module.rpartition(".")[2]


class FastInit(TorchFunctionMode):
    """While it is on, large tensors are drawn by repeating a drawn block: the values matter, their independence not."""

    BLOCK = 1 << 20

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        large = bool(args) and isinstance(args[0], Tensor) and args[0].numel() > self.BLOCK and not args[0].is_meta
        if large and func in (Tensor.uniform_, Tensor.normal_) and args[0].is_contiguous():
            flat = args[0].detach().view(-1)
            block = func(torch.empty(self.BLOCK, dtype=flat.dtype), *args[1:], **kwargs)
            whole = flat.numel() // self.BLOCK * self.BLOCK
            flat[:whole].view(-1, self.BLOCK).copy_(block)
            flat[whole:].copy_(block[: flat.numel() - whole])
            return args[0]
        # Of a truncated normal only the range matters here.
        if large and func is Tensor.erfinv_:
            return args[0]
        return func(*args, **kwargs)


def build(name: str, device: str | None = None, img_size: int | None = None) -> nn.Module:
    """The architecture in eval mode with random weights; detectors so that they are quick and find something."""
    with FastInit():
        return zoo.create_model(name, device=device, img_size=img_size, **_detection(name))


def _detection(name: str) -> dict[str, Any]:
    if family_of(name) != "torchvision/detection":
        return {}
    if "rcnn" in name:
        return {"min_size": 96, "max_size": 128, "box_score_thresh": 0.0, "box_detections_per_img": 3}
    small = {} if "ssd" in name else {"min_size": 96, "max_size": 128}
    return {**small, "score_thresh": 0.0, "detections_per_img": 3}


def smallest_inputs(name: str, model: nn.Module, params: int) -> tuple[int | None, tuple[Any, ...]]:
    """The smallest of a ladder of inputs that ``model``, on the meta device, takes.

    Returns:
        The ``img_size`` to build the model with, and random inputs for it.
    """
    family = family_of(name)
    if family == "torchvision/detection":
        return None, ([torch.rand(3, 90, 100), torch.rand(3, 64, 64)],)
    if family == "torchvision/optical_flow":
        return None, (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    batch = 1 if params > LARGE else 2
    cfg = declared(model)
    if cfg.get("fixed_input_size"):
        bound = _bound_size(name)
        if bound is not None:
            return bound, (torch.rand(batch, zoo.input_size(model)[0], bound, bound),)
        return None, _random(zoo.example_inputs(model, batch=batch))
    least = _LEAST_NORMALISED if normalised(model) else 0
    for size in (size for size in _LADDER if size >= least):
        inputs = zoo.example_inputs(model, batch=batch, size=(size, size))
        if _runs(model, inputs):
            return None, _random(inputs)
    return None, _random(zoo.example_inputs(model, batch=batch))


def _bound_size(name: str) -> int | None:
    """A smaller size to build a model for that is bound to one, where its architecture has one."""
    for size in _BOUND_LADDER:
        try:
            model = zoo.create_model(name, device="meta", img_size=size)
        except ModelError:
            continue
        if _runs(model, (torch.empty(1, zoo.input_size(model)[0], size, size, device="meta"),)):
            return size
    return None


def _runs(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    try:
        with torch.no_grad():
            out = model(*inputs)
    except Exception:  # whatever a model raises on an image that is too small for it
        return False
    return all(leaf.numel() > 0 for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor))


def normalised(model: nn.Module) -> list[_BatchNorm]:
    """Its BatchNorm layers that keep statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def _random(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(pictures(x.shape) for x in inputs)


def pictures(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Random images that differ as pictures do, in large and small structures and in contrast.

    White noise will not do: to the later layers all of it looks alike, and BatchNorm would blow up what is left.
    """
    if len(shape) != 4:
        return torch.rand(shape)
    images = torch.zeros(shape)
    size = 1
    while size <= min(shape[2:]):
        coarse = torch.randn(*shape[:2], size, size)
        images += F.interpolate(coarse, shape[2:], mode="bilinear", align_corners=False)
        size *= 2
    return images * (1.5 * torch.rand(shape[0], 1, 1, 1)).exp()
