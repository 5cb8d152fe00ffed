"""The dial of the neutral start: how far a kernel is from the convolution it began as."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from convsurgery.errors import ConversionError, nearest
from convsurgery.operators.kervolution import Kervolution2d
from convsurgery.surgery.record import unwrap

__all__ = ["nonlinearity", "set_nonlinearity"]

#: beyond it the constants leave the range of float32
_LEAST = 1e-12


def nonlinearity(model: nn.Module) -> dict[str, float]:
    """ε of every layer of ``model`` that began by neutral, by name."""
    return {name: float(layer.eps) for name, layer in _dialled(model).items() if layer.eps is not None}


def set_nonlinearity(model: nn.Module, eps: float | Mapping[str, float]) -> dict[str, float]:
    """Set how far layers on the neutral start are from the convolution.

    A layer computes g·[κ(εx) − κ(0)] in effect, with g so that small inputs meet the convolution's response whatever ε:
    near 0 it is the convolution, at 1 the paper's kernel with the filters as they are (poly and sigmoid) or one about
    as nonlinear (gauss, l2). Changes no parameters, but for a learnable γ.

    Args:
        model: a converted model; changed in place.
        eps: for all such layers, or by name; from 1e-12 to 1.

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
        if not _LEAST <= value <= 1:
            raise ConversionError(f"{name or 'the model itself'}: ε must be from {_LEAST:g} to 1, not {value}")
    for name, value in wanted.items():
        layers[name].set_nonlinearity(float(value))
    return nonlinearity(model)


def _dialled(model: nn.Module) -> dict[str, Kervolution2d]:
    return {
        name: module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, Kervolution2d) and module.eps is not None
    }
