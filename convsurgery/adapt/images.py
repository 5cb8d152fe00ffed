"""Images to calibrate on: a tensor, a loader or a folder, checked against what the model was trained with."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from convsurgery.adapt.data import DataSplit, InputSpec, image_transform, input_spec
from convsurgery.adapt.evaluation import device_of
from convsurgery.adapt.formats import FORMATS
from convsurgery.errors import DataError, SettingsError, warn

__all__ = ["Images", "calibration_images"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


class Images:
    """Batches of images, the same ones each time it is gone through; of the model's floating dtype, on its device.

    Args:
        source: gives batches; must start anew for every pass.
        limit: images to stop after; None for all.
        model: whose dtype, device and input they are for.
    """

    def __init__(self, source: Iterable[Any], limit: int | None, model: nn.Module) -> None:
        self.source, self.limit = source, limit
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.dtype = torch.float32 if first is None else first.dtype
        self.device = device_of(model)
        self.spec = input_spec(model) if getattr(model, "pretrained_cfg", None) else None
        self.warned = False

    def __iter__(self) -> Iterator[Tensor]:
        left = self.limit
        for batch in _same_order(self.source):
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            self._check(images)
            if left is not None:
                images = images[:left]
                left -= len(images)
            if images.numel():
                yield images.to(self.device, self.dtype)
            if left == 0:
                return

    def _check(self, images: Any) -> None:
        if not isinstance(images, Tensor):
            raise DataError(f"a batch must be a tensor of images, or a tuple that begins with one, not {_kind(images)}")
        if images.dim() != 4:
            raise DataError(f"images come as (N, C, H, W), not {tuple(images.shape)}")
        if not images.is_floating_point():
            raise DataError(
                f"images of {str(images.dtype).removeprefix('torch.')}: scale them to 0..1 and normalise them as in "
                f"training{self._advice()}"
            )
        if not images.numel():
            return
        if not bool(images.isfinite().all()):
            raise DataError("an image holds NaN or infinity")
        if not self.warned and (odd := self._unnormalised(images)):
            self.warned = True
            warn(odd)

    def _advice(self) -> str:
        return "" if self.spec is None else f": mean {_short(self.spec.mean)}, std {_short(self.spec.std)}"

    def _unnormalised(self, images: Tensor) -> str | None:
        """What looks wrong: raw values of a camera where the model wants them centred."""
        spec = self.spec
        low, high = float(images.amin()), float(images.amax())
        if high > 32:
            return f"images go up to {high:.4g}: they look like 0..255, not normalised{self._advice()}"
        centred = spec is not None and max(spec.mean) > 0.05
        if centred and low >= 0 and high <= 1 and high > low:
            return (
                f"images lie between {low:.3g} and {high:.3g}: they look un-normalised, and this model was trained on "
                f"normalised ones{self._advice()}"
            )
        return None


def calibration_images(data: Any, model: nn.Module, *, images: int | None = None, batch_size: int = 64) -> Images:
    """Images for calibration, scanning and choosing.

    Args:
        data: a tensor (N, C, H, W); a DataLoader or another iterable of batches, tensors or ``(images, ...)``, that can
            be gone through repeatedly; a :class:`DataSplit`, whose training part is taken; or a folder, in which all
            images are taken in the order of their names, prepared as in validation.
        model: gives dtype, device, and for a folder size and normalisation.
        images: how many to take at most; all when None.
        batch_size: of a tensor or folder.

    Raises:
        SettingsError: for a number of images below 1.
        DataError: for anything else, a generator (it ends after one pass), a folder without images; while iterating
            for batches of a wrong form, integer images, or values that are not finite. Warns when the images look
            un-normalised.
    """
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
        raise SettingsError(f"images must be a whole number of at least 1, not {images!r}")
    if isinstance(data, Images):
        return Images(data.source, images if images is not None else data.limit, model)
    if isinstance(data, Tensor):
        return Images(_Chunks(data, batch_size), images, model)
    if isinstance(data, DataSplit):
        return Images(data.train, images, model)
    if isinstance(data, (str, os.PathLike)):
        return Images(_Folder(Path(data).expanduser(), input_spec(model), batch_size), images, model)
    if isinstance(data, Iterator):
        raise DataError(f"{_kind(data)} can be gone through once only: pass a list of batches, a loader or a tensor")
    if not isinstance(data, Iterable):
        raise DataError(f"calibration takes a tensor, a loader, a list of batches or a folder, not {_kind(data)}")
    return Images(data, images, model)


def _same_order(source: Iterable[Any]) -> Iterator[Any]:
    """What a loader draws, orders and augmentations, is the same in every pass, and the caller's random state stays."""
    if not isinstance(source, DataLoader):
        yield from source
        return
    owners = (source, source.sampler, getattr(source.batch_sampler, "sampler", None))
    found = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    draws = _Draws(list(found.values()))
    with draws:
        passes = iter(source)
    while True:
        with draws:
            batch = next(passes, None)
        if batch is None:
            return
        yield batch


class _Draws:
    """Random states of their own inside, whose course goes on with each entry; begins at a fixed one."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        self.generators = generators
        self.theirs = self._states()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        for generator in generators:
            generator.manual_seed(0)
        self.own = self._states()
        self._set(self.theirs)

    def _states(self) -> tuple[Any, ...]:
        drawn = [generator.get_state() for generator in self.generators]
        return torch.get_rng_state(), random.getstate(), np.random.get_state(), drawn

    def _set(self, states: tuple[Any, ...]) -> None:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        for generator, state in zip(self.generators, states[3], strict=True):
            generator.set_state(state)

    def __enter__(self) -> None:
        self.theirs = self._states()
        self._set(self.own)

    def __exit__(self, *_: object) -> None:
        self.own = self._states()
        self._set(self.theirs)


class _Chunks:
    def __init__(self, images: Tensor, size: int) -> None:
        self.images, self.size = images, size

    def __iter__(self) -> Iterator[Tensor]:
        # What has no batches is given as it is, to be refused with its shape.
        yield from self.images.split(self.size) if self.images.dim() == 4 else [self.images]


class _Folder:
    """Image files below a folder, whatever their classes."""

    def __init__(self, folder: Path, spec: InputSpec, batch_size: int) -> None:
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}")
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
        if not self.files:
            raise DataError(f"no images in {folder}; looked for {', '.join(sorted(_SUFFIXES))}")
        self.batch_size = batch_size
        self.mode = "L" if spec.input_size[0] == 1 else "RGB"
        self.transform = image_transform(spec)

    def __iter__(self) -> Iterator[Tensor]:
        from PIL import Image, UnidentifiedImageError

        for start in range(0, len(self.files), self.batch_size):
            batch = []
            for path in self.files[start : start + self.batch_size]:
                try:
                    with Image.open(path, formats=FORMATS) as image:
                        batch.append(self.transform(image.convert(self.mode)))
                except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
                    raise DataError(f"{path} is not an image that can be read: {error}") from error
            yield torch.stack(batch)


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"
