"""Folding what deployment does not need: operators' constants, and the BatchNorms behind them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from convsurgery.graph import Region, aliases, copy_model, followers, regions
from convsurgery.operators import OperatorLayer
from convsurgery.operators.fused import batchnorm_affine, without_affine
from convsurgery.surgery.blend import finish_blend
from convsurgery.surgery.onward import consumers, scale_inputs
from convsurgery.surgery.record import Record, record, set_record

__all__ = ["fuse"]


@torch.inference_mode(False)
def fuse(model: nn.Module) -> nn.Module:
    """An eval-mode copy of ``model`` with every operator's constants and following BatchNorm folded into it.

    Computes the same up to rounding, without the batch norms' passes; meant for deployment, not for training. A gain
    that an operator is left with goes into the weights of the convolution behind it, where there is nothing but a ReLU,
    pooling or dropout between them.
    A BatchNorm is folded where FX shows that it alone consumes the operator's output; where the model does not trace,
    the constants are folded and the BatchNorms stay.
    """
    fused = finish_blend(copy_model(model).eval())
    done = record(fused) or Record(())
    modules = dict(fused.named_modules(remove_duplicate=False))
    graphs, _ = regions(fused, contextlib.nullcontext())
    after = dict(followers(graphs, modules))
    names = aliases(fused)
    for name, module in list(fused.named_modules()):
        if not isinstance(module, OperatorLayer):
            continue
        new = module.fold()
        norm_name = next((after[alias] for alias in names[id(module)] if alias in after), None)
        rest = None if norm_name is None else without_affine(modules[norm_name])
        if norm_name is not None and rest is not None and new.absorb_affine(*batchnorm_affine(modules[norm_name])):
            _replace(modules, names[id(modules[norm_name])], rest)
        if name:
            _replace(modules, names[id(module)], new)
        else:
            fused = new
    _hand_on(fused, graphs)
    set_record(fused, dataclasses.replace(done, fused=True))
    return fused.eval()


def _hand_on(model: nn.Module, graphs: Sequence[Region]) -> None:
    """Leave gains to the convolutions behind, which multiply by something anyway."""
    modules, names = dict(model.named_modules(remove_duplicate=False)), aliases(model)
    for name, next_name in list(consumers(graphs, modules)):
        layer, conv = modules[name], modules[next_name]
        if not isinstance(layer, OperatorLayer) or type(conv) is not nn.Conv2d:
            continue
        gain = layer.leave_gain()
        if gain is not None:
            new = scale_inputs(conv, gain)
            _replace(modules, names[id(conv)], new)
            modules.update(dict.fromkeys(names[id(conv)], new))


def _replace(modules: dict[str, nn.Module], names: tuple[str, ...], new: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        modules[parent]._modules[child] = new
