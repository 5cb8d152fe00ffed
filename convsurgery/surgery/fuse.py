"""Folding what deployment does not need: operators' constants, and the BatchNorms behind them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from convsurgery.graph import aliases, copy_model, followers, trace
from convsurgery.operators.kervolution import Kervolution2d
from convsurgery.surgery.record import Record, record, set_record

__all__ = ["fuse"]


def fuse(model: nn.Module) -> nn.Module:
    """An eval-mode copy of ``model`` with every operator's constants and following BatchNorm folded into it.

    Computes the same up to rounding, without the batch norms' passes; meant for deployment, not for training.
    A BatchNorm is folded where FX shows that it alone consumes the operator's output; where the model does not trace,
    the constants are folded and the BatchNorms stay.
    """
    fused = copy_model(model).eval()
    modules = dict(fused.named_modules(remove_duplicate=False))
    try:
        after = followers(trace(fused), modules)
    except Exception:  # whatever FX raises: the model is then fused without its batch norms
        after = {}
    names = aliases(fused)
    for name, module in list(fused.named_modules()):
        if not isinstance(module, Kervolution2d):
            continue
        new = module.fuse()
        norm_name = next((after[alias] for alias in names[id(module)] if alias in after), None)
        rest = None if norm_name is None else _without_norm(modules[norm_name])
        if norm_name is not None and rest is not None:
            new.absorb_affine(*_affine(modules[norm_name]))
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


def _without_norm(norm: nn.Module) -> nn.Module | None:
    """What remains of a normalisation layer once its affine is gone; None for kinds that are not known."""
    from timm.layers import BatchNormAct2d

    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm) is BatchNormAct2d:
        parts = (norm.get_submodule("drop"), norm.get_submodule("act"))
        return nn.Sequential(*parts)
    return None


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """An eval-mode BatchNorm as gain and bias in float64."""
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    gain = torch.rsqrt(var.double() + float(norm.eps))  # type: ignore[arg-type]
    if isinstance(norm.weight, Tensor):
        gain = gain * norm.weight.detach()
    bias = -mean * gain
    if isinstance(norm.bias, Tensor):
        bias = bias + norm.bias.detach()
    return gain, bias
