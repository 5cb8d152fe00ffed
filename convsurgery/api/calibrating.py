"""Fitting a converted model to its original, without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from convsurgery.adapt.calibration import Calibration, fits_of, run_fits
from convsurgery.adapt.fitting import FitOptions, LayerFit
from convsurgery.adapt.images import calibration_images
from convsurgery.errors import ConversionError
from convsurgery.surgery import record

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    teacher: nn.Module,
    images: int | None = None,
    target: float | None = None,
    batchnorm: bool = False,
    steps: int = 0,
    progress: bool = True,
    on_layer: Callable[[LayerFit], object] | None = None,
) -> Calibration:
    """Fit what has a closed form to the teacher's convolutions; no training.

    Layer by layer in execution order, in float64, streaming: each pass over the images runs no further than the layer
    it is for, and keeps sums, not activations. ``model`` is changed in place. Layers that start by ``neutral`` get the
    largest ε that meets ``target``, unless the rule gave one, and the best gain and offset for it; those that start by
    ``fit`` their best weights; kervolutions that start by ``copy``, alone or in a blend, the best gain and offset. With
    ``steps`` fitted layers are then improved by gradient, each on its own.

    What :func:`convert` does with ``calibration=``, for a model converted before, and with more choices.

    Args:
        model: a converted model.
        data: a tensor of images (N, C, H, W), a DataLoader or another iterable of batches that can be repeated, a
            :class:`DataSplit` or a folder of image files. 64 images are enough for most layers.
        teacher: the original model; not changed.
        images: how many to use at most; all when None.
        target: relative error that a layer on the neutral start may have; 1e-3 when None.
        batchnorm: give BatchNorms behind fitted layers the mean and variance they now meet, relative to the teacher's.
        steps: of gradient descent on each fitted layer; a few hundred help where the closed form leaves much.
        progress: a bar, where standard error is a terminal.
        on_layer: called with every :class:`LayerFit` when it is done.

    Returns:
        A mapping from names to the relative error left at each layer, √(mean square over variance), channels averaged;
        prints as a table with the errors before, and what was found.

    Raises:
        ConversionError: when no operator of the model can be fitted, or the teacher is another model.
        DataError: for data that is empty, of the wrong size or type, or not finite. Warns when images look
            un-normalised.
    """
    done = record(model)
    fits = fits_of(done.edits if done else ())
    if not fits:
        raise ConversionError(
            "no operator of this model starts by neutral, fit, copy or blend: there is nothing to fit"
        )
    source = calibration_images(data, model, images=images)
    options = FitOptions(target, batchnorm, steps)
    return run_fits(model, teacher, fits, source, options, progress=progress, on_layer=on_layer)
