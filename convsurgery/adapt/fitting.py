"""Closed-form fits of operators to the convolutions they replaced: layer by layer, streaming over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.errors import ConversionError, DataError
from convsurgery.graph import copy_model
from convsurgery.operators import OperatorLayer

__all__ = ["Fit", "fit_layers"]


@dataclass(frozen=True)
class Fit:
    """How one operator is fitted.

    Attributes:
        ridge: strength of the penalty; None for the operator's own.
        batchnorm: name of the BatchNorm that alone consumes its output, to take an offset the operator cannot hold.
        branch: for the place of a residual block, the first and the last module of its branch in the original: the
            first is given y, the last gives what is added to it.
    """

    ridge: float | None = None
    batchnorm: str | None = None
    branch: tuple[str, str] | None = None


def fit_layers(
    model: nn.Module,
    teacher: nn.Module,
    layers: Mapping[str, Fit],
    batches: Any,
    on_layer: Callable[[str, float], object] | None = None,
) -> dict[str, float]:
    """Fit each named operator to the outputs of the convolution it replaced.

    Layer by layer in the order given (execution order), so that a later layer is fitted to what the earlier ones now
    give. A few streaming passes over ``batches`` for each layer; no activation is kept.

    Args:
        model: the converted model; changed in place.
        teacher: the original model, with convolutions of the same names.
        layers: the operators to fit, by name.
        batches: a tensor of images, or an iterable of such or of ``(images, targets)`` that can be gone through
            repeatedly, such as a DataLoader.
        on_layer: called with every layer's name and error when it is done.

    Returns:
        For each layer the relative error that is left: √(unexplained over total variance), channels averaged.

    Raises:
        DataError: when there is nothing to go through.
        ConversionError: for a layer that has no fit, or is not in the teacher.
    """
    reference = copy_model(teacher).eval()
    training = {module: module.training for module in model.modules()}
    model.eval()
    errors = {}
    try:
        for name, fit in layers.items():
            errors[name] = _fit(model, reference, name, fit, batches)
            if on_layer is not None:
                on_layer(name, errors[name])
    finally:
        for module, flag in training.items():
            module.training = flag
    return errors


def _fit(model: nn.Module, reference: nn.Module, name: str, fit: Fit, batches: Any) -> float:
    norm, original = (_running_mean(part, fit.batchnorm) for part in (model, reference))
    layer = model.get_submodule(name)
    parts = dict(reference.named_modules(remove_duplicate=False))
    first, last = (parts.get(each) for each in fit.branch or (name, name))
    if first is None or last is None or (fit.branch is None and not isinstance(first, nn.Conv2d)):
        missing = name if fit.branch is None else fit.branch[0 if first is None else 1]
        raise ConversionError(f"the teacher has no convolution {missing!r}: it must be the model before conversion")
    fitter = layer.fitter(last, fit.ridge, shift=norm is not None) if isinstance(layer, OperatorLayer) else None
    if fitter is None or not isinstance(layer, OperatorLayer):
        raise ConversionError(f"{name}, a {type(layer).__name__}, has no closed-form fit")
    seen: list[tuple[Tensor, Tensor]] = []
    wanted: list[Tensor] = []
    # What comes behind may work in place, so that both are copied.
    handles = [
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0].detach().clone(), out.detach().clone()))),
        last.register_forward_hook(lambda _, args, out: wanted.append(out.detach().clone())),
    ]
    if fit.branch is not None:
        # y itself, before the branch can work on it in place
        begun: list[Tensor] = []

        def add_input(*_: Any) -> None:  # a hook that returned something would change the model's own output
            wanted[-1].add_(begun.pop())

        handles.append(first.register_forward_pre_hook(lambda _, args: begun.append(args[0].detach().clone())))
        handles.append(last.register_forward_hook(add_input))
    home, its_home = (next(part.parameters()).device for part in (model, reference))
    try:
        while True:
            count = 0
            for images in _images(batches):
                with torch.no_grad():
                    model(images.to(home))
                    reference(images.to(its_home))
                if len(seen) != len(wanted):
                    raise ConversionError(f"{name} is called {len(seen)} times, its convolution {len(wanted)} times")
                pairs = list(zip(seen, wanted, strict=True))
                for (given, out), target in pairs:
                    fitter.add(layer.prepared(given), out, target.to(out.device))
                count += len(pairs)
                # A fit may have called the layer itself.
                seen.clear()
                wanted.clear()
            if not count:
                raise DataError("the calibration data is empty")
            error = fitter.finish()
            if error is not None:
                if norm is not None and original is not None and fitter.shift is not None:
                    # It normalises y − μ: adding to y is taking away from μ.
                    norm.copy_(original.to(norm.device) - fitter.shift.to(norm.device))
                return error
    finally:
        for handle in handles:
            handle.remove()


def _running_mean(model: nn.Module, name: str | None) -> Tensor | None:
    norm = None if name is None else dict(model.named_modules(remove_duplicate=False)).get(name)
    mean = getattr(norm, "running_mean", None)
    return mean if isinstance(mean, Tensor) and mean.dtype in (torch.float32, torch.float64) else None


def _images(batches: Any) -> Iterable[Tensor]:
    for batch in (batches,) if isinstance(batches, Tensor) else batches:
        yield batch if isinstance(batch, Tensor) else batch[0]
