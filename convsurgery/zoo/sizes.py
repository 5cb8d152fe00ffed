"""The image size a model expects, read from the model and from what its library says about it."""

from __future__ import annotations

from typing import Any

from torch import nn

from convsurgery.plain import declared
from convsurgery.zoo.names import TORCHVISION, Base

__all__ = ["first_channels", "image_pair", "input_size", "own_size", "set_input_size", "torchvision_builders"]


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width (pixels) of one input image.

    In this order: the size the model was created for, timm's ``pretrained_cfg`` (with the model's own channels and,
    where it is bound to a size, its own size), the crop of torchvision's weights, (3, 224, 224) with the channels of
    the first convolution.

    >>> from convsurgery.zoo import create_model
    >>> input_size(create_model("torchvision/inception_v3", device="meta"))
    (3, 299, 299)
    """
    recorded = getattr(model, "_convsurgery_input_size", None)
    if recorded is not None:
        channels, height, width = recorded
        return int(channels), int(height), int(width)
    cfg = declared(model)
    if cfg.get("input_size"):
        height, width = own_size(model) or tuple(cfg["input_size"][1:])
        return first_channels(model), int(height), int(width)
    height, width = _torchvision_size(model) or (224, 224)
    return first_channels(model), height, width


def own_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width that a timm model is bound to, or was built for by its ``img_size``."""
    bound = image_pair(getattr(getattr(model, "patch_embed", None), "img_size", None))
    return bound or image_pair((getattr(model, "_traits", None) or {}).get("img_size"))


def set_input_size(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Make ``size`` (channels, height, width) what :func:`input_size` gives for ``model``."""
    object.__setattr__(model, "_convsurgery_input_size", size)


def image_pair(size: Any) -> tuple[int, int] | None:
    """``224`` as ``(224, 224)``; None for anything that is not one or two numbers."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and size and all(isinstance(value, int) for value in size) and len(size) <= 2:
        return size[0], size[-1]
    return None


def first_channels(model: nn.Module) -> int:
    """Channels of the input image."""
    told = getattr(model, "in_chans", None)
    if isinstance(told, int):
        return told
    cfg = declared(model)
    if not cfg.get("input_size"):
        # Whatever stands in a convolution's place has its in_channels too.
        found = (getattr(module, "in_channels", None) for module in model.modules())
        return next((channels for channels in found if isinstance(channels, int)), 3)
    usual = int(cfg["input_size"][0])
    names = cfg.get("first_conv") or ()
    modules = dict(model.named_modules())
    for name in [names] if isinstance(names, str) else names:
        channels = getattr(modules.get(name), "in_channels", None)
        # A space-to-depth stem multiplies the channels before its convolution sees them.
        if isinstance(channels, int) and channels not in (4 * usual, 16 * usual):
            return channels
    return usual


def torchvision_builders(model: nn.Module) -> list[str]:
    """Names of torchvision's builders in the file of the model's class, or in one named after it (ssdlite)."""
    home = type(model).__module__
    if not home.startswith("torchvision.models."):
        return []
    from torchvision.models import get_model_builder
    from torchvision.models import list_models as names

    return [name for name in names() if get_model_builder(name).__module__.startswith(home)]


def _torchvision_size(model: nn.Module) -> tuple[int, int] | None:
    own = image_pair(getattr(model, "image_size", None))
    if own:
        return own
    base = getattr(model, "_convsurgery_base", None)
    if isinstance(base, Base) and base.name.startswith(TORCHVISION):
        return _crop(base.name.removeprefix(TORCHVISION))
    builders = torchvision_builders(model)
    sizes = {_crop(name) for name in builders}
    if len(sizes) <= 1:
        return sizes.pop() if sizes else None
    from convsurgery.zoo.identify import identify

    found = identify(model)
    return _crop(found.name.removeprefix(TORCHVISION)) if found else None


def _crop(name: str) -> tuple[int, int] | None:
    """The size that the transforms of a builder's default weights end in."""
    from torchvision.models import get_model_weights

    try:
        preset = get_model_weights(name).DEFAULT.transforms()
    except (AttributeError, ValueError):  # a builder without weights
        return None
    return image_pair(getattr(preset, "crop_size", None)) or image_pair(getattr(preset, "resize_size", None))
