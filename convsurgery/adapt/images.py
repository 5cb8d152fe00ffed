"""Images to calibrate on: a tensor, a loader or a folder, checked against what the model was trained with."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from convsurgery.adapt.data import DataSplit, InputSpec, image_transform, input_spec
from convsurgery.adapt.formats import FORMATS
from convsurgery.adapt.holdout import sources_of
from convsurgery.adapt.running import device_of
from convsurgery.adapt.spread import Spread, classes_of, files_of, map_style, spread
from convsurgery.errors import DataError, SettingsError, warn
from convsurgery.plain import declared

__all__ = ["Images", "calibration_images", "check_number", "dataset_behind", "part_of"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


class Images:
    """Batches of images, the same ones each time it is gone through; of the model's floating dtype, on its device.

    Args:
        source: gives batches; must start anew for every pass.
        limit: images to stop after; None for all.
        model: whose dtype, device and input they are for.
        taken: which part of a set the source gives; None for a source that is used as it was given.
        sources: of each image the picture it was cropped from, where files are known.
        ask: what gives images of the same kind for another limit and model.
    """

    def __init__(
        self,
        source: Iterable[Any],
        limit: int | None,
        model: nn.Module,
        *,
        taken: Spread | None = None,
        sources: Sequence[str] | None = None,
        ask: Callable[[int | None, nn.Module], Images] | None = None,
    ) -> None:
        self.source, self.limit, self.taken, self.sources, self.ask = source, limit, taken, sources, ask
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.dtype = torch.float32 if first is None else first.dtype
        self.device = device_of(model)
        self.spec = input_spec(model) if declared(model) else None
        self.warned = False
        self.seen = 0

    @property
    def most(self) -> int | None:
        """How many images there are at most, where that is known beforehand."""
        return self.limit if self.taken is None else len(self.taken.indices)

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.labelled())

    def labelled(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The same batches with their class numbers (N,), None where the source gives none."""
        left, self.seen = self.limit, 0
        for batch in _same_order(self.source):
            several = isinstance(batch, (tuple, list)) and bool(batch)
            images = batch[0] if several else batch
            self._check(images)
            labels = _labels(batch[1] if several and len(batch) > 1 else None, len(images))
            if left is not None:
                images, labels = images[:left], None if labels is None else labels[:left]
                left -= len(images)
            self.seen += len(images)
            if images.numel():
                yield images.to(self.device, self.dtype), labels
            if left == 0:
                return

    def __str__(self) -> str:
        """Which images these are, once they were gone through: "256 of 1,347 images, seed 0"."""
        if self.taken is not None:
            return str(self.taken)
        first = "the first " if self.limit is not None and self.seen == self.limit else ""
        return f"{first}{self.seen:,} images, as they were given"

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


def calibration_images(
    data: Any, model: nn.Module, *, images: int | None = None, batch_size: int = 64, seed: int = 0
) -> Images:
    """Images for calibration, scanning and choosing.

    Of a folder, a data set or a tensor a part is drawn by ``seed`` from the whole, evenly over folders or classes where
    the set keeps a list of them; a loader or another iterable is used as it is given, up to the limit.

    Args:
        data: a tensor (N, C, H, W); a Dataset, or a pair (train, val) whose first part is taken; a DataLoader or
            another iterable of batches, tensors or ``(images, ...)``, that can be gone through repeatedly; a
            :class:`DataSplit`, whose training part is taken; or a folder, of which all images are meant, prepared as
            in validation.
        model: gives dtype, device, and for a folder size and normalisation.
        images: how many to take at most; all when None.
        batch_size: of a tensor, data set or folder.
        seed: of the draw.

    Raises:
        SettingsError: for a number of images below 1, or a seed that is no whole number.
        DataError: for anything else, a generator (it ends after one pass), a folder without images; while iterating
            for batches of a wrong form, integer images, or values that are not finite. Warns when the images look
            un-normalised.
    """
    check_number("images", images, least=1)
    check_number("seed", seed, least=None)
    if isinstance(data, Images):
        most = min((count for count in (images, data.most) if count is not None), default=None)
        return Images(data.source, most, model) if data.ask is None else data.ask(most, model)
    if isinstance(data, Sequence) and len(data) == 2 and isinstance(data[0], (DataLoader, Dataset)):
        data = data[0]

    def ask(count: int | None, model: nn.Module) -> Images:
        made = _images(data, model, count, batch_size, seed)
        made.ask = ask
        return made

    return ask(images, model)


def check_number(name: str, value: Any, *, least: int | None) -> None:
    """Refuse what is no whole number, or below ``least``; None stands for no limit."""
    if value is None and least is not None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        legal = "a whole number" + (f" of at least {least}" if least is not None else "")
        raise SettingsError(f"{name} must be {legal}, not {value!r}")


def _images(data: Any, model: nn.Module, count: int | None, batch_size: int, seed: int) -> Images:
    if isinstance(data, Tensor):
        return _of_tensor(data, model, count, batch_size, seed)
    if isinstance(data, DataSplit):
        whole = data.train if count is None else dataset_behind(data.train)
        if isinstance(whole, DataLoader):
            return Images(whole, count, model)
        return _of_dataset(whole, model, count, seed, like=data.train)
    if isinstance(data, (str, os.PathLike)):
        return _of_folder(Path(data).expanduser(), model, count, batch_size, seed)
    if isinstance(data, Dataset):
        if map_style(data):
            return _of_dataset(data, model, count, seed, like=DataLoader(data, batch_size))
        if isinstance(data, Iterable):
            return Images(DataLoader(data, batch_size), count, model)
    if isinstance(data, Iterator):
        raise DataError(f"{_kind(data)} can be gone through once only: pass a list of batches, a loader or a tensor")
    if not isinstance(data, Iterable):
        raise DataError(
            f"calibration takes a tensor, a data set, a loader, a list of batches or a folder, not {_kind(data)}"
        )
    return Images(data, count, model)


def _of_tensor(data: Tensor, model: nn.Module, count: int | None, batch_size: int, seed: int) -> Images:
    # What has no batches is given as it is, to be refused with its shape.
    if data.dim() != 4:
        return Images([data], count, model)
    taken = spread(len(data), count, seed)
    part = data if taken.seed is None else data[torch.as_tensor(taken.indices, device=data.device)]
    return Images(_Chunks(part, batch_size), None, model, taken=taken)


def _of_dataset(dataset: Any, model: nn.Module, count: int | None, seed: int, *, like: DataLoader[Any]) -> Images:
    loader, taken = part_of(dataset, count, seed, like)
    files = files_of(dataset)
    # Of all files, since what is drawn of them shows no longer how they are numbered.
    sources = None if files is None else sources_of(files)
    return Images(loader, None, model, taken=taken, sources=sources and [sources[index] for index in taken.indices])


def part_of(dataset: Any, count: int | None, seed: int, like: DataLoader[Any]) -> tuple[DataLoader[Any], Spread]:
    """``count`` items of a set, spread over its classes, loaded as ``like`` loads them."""
    taken = spread(len(dataset), count, seed, classes_of(dataset), "classes")
    loader = DataLoader(
        dataset,
        batch_size=like.batch_size,
        sampler=taken.indices,
        num_workers=like.num_workers,
        collate_fn=like.collate_fn,
        pin_memory=like.pin_memory,
        worker_init_fn=like.worker_init_fn,
    )
    return loader, taken


def dataset_behind(loader: DataLoader[Any]) -> Any:
    """The set a plain loader takes whole, in order or shuffled; the loader itself where it does more than that."""
    plain = type(loader) is DataLoader and type(loader.batch_sampler) is BatchSampler and map_style(loader.dataset)
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler):
        plain = plain and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    elif not isinstance(sampler, SequentialSampler):
        plain = False
    return loader.dataset if plain else loader


def _of_folder(folder: Path, model: nn.Module, count: int | None, batch_size: int, seed: int) -> Images:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise DataError(f"no images in {folder}; looked for {', '.join(sorted(_SUFFIXES))}")
    taken = spread(len(files), count, seed, [path.parent for path in files], "folders")
    sources = sources_of([str(path) for path in files])
    source = _Files([files[index] for index in taken.indices], input_spec(model), batch_size)
    return Images(source, None, model, taken=taken, sources=[sources[index] for index in taken.indices])


def _labels(labels: Any, count: int) -> Tensor | None:
    """Class numbers, if that is what comes beside the images."""
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    return labels if whole and labels.shape == (count,) else None


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
        yield from self.images.split(self.size)


class _Files:
    """Image files, whatever their classes, prepared as in validation."""

    def __init__(self, files: Sequence[Path], spec: InputSpec, batch_size: int) -> None:
        self.files, self.batch_size = files, batch_size
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
