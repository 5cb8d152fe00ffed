"""Folding what deployment does not need: operators' constants, and the BatchNorms behind them."""

from __future__ import annotations

import contextlib
import dataclasses

from torch import nn

from convsurgery.graph import aliases, copy_model, followers, regions
from convsurgery.operators import OperatorLayer
from convsurgery.operators.fused import batchnorm_affine, without_affine
from convsurgery.surgery.blend import finish_blend
from convsurgery.surgery.record import Record, record, set_record

__all__ = ["fuse"]


def fuse(model: nn.Module) -> nn.Module:
    """An eval-mode copy of ``model`` with every operator's constants and following BatchNorm folded into it.

    Computes the same up to rounding, without the batch norms' passes; meant for deployment, not for training.
    A BatchNorm is folded where FX shows that it alone consumes the operator's output; where the model does not trace,
    the constants are folded and the BatchNorms stay.
    """
    fused = finish_blend(copy_model(model).eval())
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
    set_record(fused, dataclasses.replace(record(model) or Record(()), fused=True))
    return fused.eval()


def _replace(modules: dict[str, nn.Module], names: tuple[str, ...], new: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        modules[parent]._modules[child] = new
