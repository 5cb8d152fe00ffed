"""Fitting a converted model to its original, without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from convsurgery.adapt.calibration import Calibration, fits_of_model, run_fits
from convsurgery.adapt.evaluation import evaluate_labelled
from convsurgery.adapt.fitting import FitOptions, LayerFit
from convsurgery.adapt.footing import warn_of_random
from convsurgery.adapt.images import calibration_images
from convsurgery.errors import ConversionError
from convsurgery.surgery import weights_of

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    teacher: nn.Module,
    images: int | None = None,
    seed: int = 0,
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
    ``fit``, or otherwise for want of data, their best weights; kervolutions that start by ``copy``, alone or in a
    blend, the best gain and offset. With ``steps`` fitted layers are then improved by gradient, each on its own.

    What :func:`convert` does with ``calibration=``, for a model converted before, and with more choices.

    Args:
        model: a converted model.
        data: a tensor of images (N, C, H, W), a Dataset or a pair (train, val), a DataLoader or another iterable of
            batches that can be repeated, a :class:`DataSplit` or a folder of image files. 64 images are enough for
            most layers.
        teacher: the original model; not changed.
        images: how many to use at most, all when None: of a folder, data set or tensor a part drawn from the whole,
            evenly over folders or classes; of a loader or another iterable the first ones.
        seed: of the draw.
        target: relative error that a layer on the neutral start may have; 1e-3 when None.
        batchnorm: give BatchNorms behind fitted layers the mean and variance they now meet, relative to the teacher's.
        steps: of gradient descent on each fitted layer; a few hundred help where the closed form leaves much.
        progress: a bar, where standard error is a terminal.
        on_layer: called with every :class:`LayerFit` when it is done.

    Returns:
        A mapping from names to the relative error left at each layer, √(mean square over variance), channels averaged;
        prints as a table with the errors before, what was found, and which images it was found on. Where the data hold
        labels, it says when the answers are no better than always the most frequent class.

    Raises:
        ConversionError: when the model holds nothing to fit, or the teacher is another model.
        DataError: for data that is empty, of the wrong size or type, or not finite. Warns when images look
            un-normalised, and when the teacher's weights are random.
    """
    fits = fits_of_model(model)
    if not fits:
        raise ConversionError(
            "no operator of this model starts by neutral, fit, copy or blend, or otherwise for want of data: there is "
            "nothing to fit"
        )
    source = calibration_images(data, model, images=images, seed=seed)
    options = FitOptions(target, batchnorm, steps)
    warn_of_random(teacher=teacher)
    found = run_fits(model, teacher, fits, source, options, progress=progress, on_layer=on_layer)
    result = evaluate_labelled(model, source)
    notes = result.notes if result else ()
    return dataclasses.replace(found, data=str(source), weights=str(weights_of(teacher)), notes=notes)
