"""Channel pruning of converted models with Torch-Pruning.

The simple way is the other order: prune the model, then convert what is left. Where a converted model is to be pruned,
:func:`torch_pruning` tells Torch-Pruning what it has to know::

    with convsurgery.pruning.torch_pruning(model) as known:
        importance = tp.importance.GroupMagnitudeImportance(target_types=known.target_types)
        pruner = tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, **known.options)
    pruner.step()
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.errors import ConversionError, ConvSurgeryError
from convsurgery.operators import Blend, OperatorLayer

__all__ = ["Known", "torch_pruning"]


@dataclass(frozen=True)
class Known:
    """What Torch-Pruning is to be told.

    Attributes:
        options: arguments of its pruners: ``customized_pruners`` and ``root_module_types``.
        target_types: argument of its importances: the classes whose filters count.
    """

    options: dict[str, Any]
    target_types: list[Any]


@contextlib.contextmanager
def torch_pruning(model: nn.Module) -> Iterator[Known]:
    """While a pruner of Torch-Pruning is made inside, it sees every operator of ``model`` as a convolution.

    Only operators without groups are possible whose filters are a convolution's, and which hold nothing else for each
    channel: the kervolutions before they are fitted or channelwise learnable. ``model`` is otherwise as
    before when the block ends; pruning itself (``step``) comes behind it.

    Raises:
        ConversionError: for a model with another operator, naming it.
        ConvSurgeryError: where Torch-Pruning is not installed.
    """
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise ConvSurgeryError("Torch-Pruning is not installed: pip install torch-pruning") from error
    layers: dict[str, OperatorLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, Blend):
            raise ConversionError(f"{name} is a Blend: finish it first (convsurgery.finish_blend)")
        if isinstance(module, OperatorLayer):
            _check(name, module)
            layers[name] = module
    plain = tp.pruner.function.PrunerBox[tp.ops.OPTYPE.CONV]
    kinds = list(dict.fromkeys(type(layer) for layer in layers.values()))
    types = [tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR]
    options = {"customized_pruners": dict.fromkeys(kinds, plain), "root_module_types": [*types, *kinds]}
    target = [nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, *kinds]
    try:
        for layer in layers.values():
            vars(layer)["forward"] = functools.partial(_convolution, layer)
        yield Known(options, target)
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


def _check(name: str, layer: OperatorLayer) -> None:
    kind, geometry = type(layer).__name__, layer.geometry
    filters = (layer.out_channels, layer.in_channels // layer.groups, *geometry.kernel_size)
    if tuple(layer.weight.shape) != filters:
        raise ConversionError(
            f"{name} is a {kind}, whose weights are no convolution's filters: prune the model first and convert it then"
        )
    if layer.groups > 1:
        raise ConversionError(
            f"{name} is a {kind} in {layer.groups} groups, which Torch-Pruning prunes in a Conv2d only: prune the "
            "model first and convert it then"
        )
    held = {**layer._parameters, **layer._buffers}
    for key, value in held.items():
        if key not in ("weight", "bias") and value is not None and value.numel() > 1:
            raise ConversionError(
                f"{name} ({kind}) holds a value of {key} for each channel, which Torch-Pruning does not cut: prune the "
                "model first and convert or calibrate it then"
            )


def _convolution(layer: OperatorLayer, input: Tensor) -> Tensor:
    """What autograd records of it is one convolution, of the layer's shapes."""
    input = layer.prepared(input)
    left, right, top, bottom = layer.geometry.padding
    mode = layer.geometry.padding_mode
    padded = F.pad(input, [left, right, top, bottom], "constant" if mode in ("zeros", "same") else mode)
    bias = layer._parameters.get("bias")
    return F.conv2d(padded, layer.weight, bias, layer.stride, 0, layer.dilation, layer.groups)
