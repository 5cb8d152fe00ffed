"""The dial of the neutral start: how far a kernel is from the convolution it began as."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from convsurgery.errors import ConversionError, nearest
from convsurgery.operators.kervolution import Kervolution2d
from convsurgery.surgery.record import unwrap

__all__ = ["nonlinearity", "set_nonlinearity"]


def nonlinearity(model: nn.Module) -> dict[str, float]:
    """ε of every layer of ``model`` that began by neutral, by name."""
    return {name: layer.dial_position() for name, layer in _dialled(model).items()}


def set_nonlinearity(model: nn.Module, eps: float | Mapping[str, float]) -> dict[str, float]:
    """Set how far layers on the neutral start are from the convolution.

    At 0 a layer is the convolution, bit for bit; at 1 it is the paper's kernel on the convolution's filters, less its
    response to an empty window, up to a factor for each channel. What it does to small inputs is the convolution's
    whatever ε. Changes no parameters. In models that convsurgery 0.1 saved ε is from 1e-12 on, and moves a learnable γ.

    Args:
        model: a converted model; changed in place.
        eps: for all such layers, or by name; from 0 to 1.

    Returns:
        ε of all such layers as they are now.

    Raises:
        ConversionError: when no layer began by neutral, none has the name, or ε is out of range.

    Example:
        >>> import timm, convsurgery as cs
        >>> new = cs.convert(timm.create_model("resnet18"), "first-conv->kerv-poly")
        >>> cs.set_nonlinearity(new, 0.5)
        {'conv1': 0.5}
    """
    layers = _dialled(model)
    if not layers:
        raise ConversionError("no layer of this model began by neutral: there is no ε to set")
    wanted = dict(eps) if isinstance(eps, Mapping) else dict.fromkeys(layers, eps)
    for name, value in wanted.items():
        if name not in layers:
            raise ConversionError(f"no layer {name!r} began by neutral; {nearest(name, layers)}")
        least = layers[name].least_eps
        if not least <= value <= 1:
            raise ConversionError(f"{name or 'the model itself'}: ε must be from {least:g} to 1, not {value}")
    for name, value in wanted.items():
        layers[name].set_nonlinearity(float(value))
    return nonlinearity(model)


def _dialled(model: nn.Module) -> dict[str, Kervolution2d]:
    return {
        name: module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, Kervolution2d) and module.eps is not None
    }
