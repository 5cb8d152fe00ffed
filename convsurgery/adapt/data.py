"""Data for calibration, fine-tuning and evaluation: folders, torchvision's sets, the offline digits, your own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from convsurgery import zoo
from convsurgery.adapt.formats import ImagesOnly
from convsurgery.adapt.spread import in_memory
from convsurgery.errors import DataError, nearest
from convsurgery.files import input_path
from convsurgery.plain import declared

__all__ = ["DataSplit", "InputSpec", "image_transform", "input_spec", "list_datasets", "load_data"]

# Names timm's create_dataset takes, with their number of classes.
_TIMM = {
    "cifar10": 10,
    "cifar100": 100,
    "fashion_mnist": 10,
    "imagenet": 1000,
    "kmnist": 10,
    "mnist": 10,
    "qmnist": 10,
}
# torchvision sets timm does not know: class, train split, validation split, number of classes.
_TORCHVISION = {
    "country211": ("Country211", "train", "valid", 211),
    "dtd": ("DTD", "train", "val", 47),
    "fgvc_aircraft": ("FGVCAircraft", "train", "val", 100),
    "flowers102": ("Flowers102", "train", "val", 102),
    "food101": ("Food101", "train", "test", 101),
    "gtsrb": ("GTSRB", "train", "test", 43),
    "imagenette": ("Imagenette", "train", "val", 10),
    "oxford_iiit_pet": ("OxfordIIITPet", "trainval", "test", 37),
    "stanford_cars": ("StanfordCars", "train", "test", 196),
    "stl10": ("STL10", "train", "test", 10),
    "svhn": ("SVHN", "train", "test", 10),
}
# timm's synonyms, the usual word first.
_TRAIN_FOLDERS = ("train", "training")
_VAL_FOLDERS = ("val", "validation", "valid", "eval", "evaluation")


@dataclass(frozen=True)
class InputSpec:
    """What a model expects of an image.

    Attributes:
        input_size: channels, height, width; sizes in pixels.
        mean: per channel, subtracted from values scaled to 0..1.
        std: per channel, divides afterwards.
        interpolation: "bilinear", "bicubic", ...
        crop_pct: share of the resized image the centre crop of validation keeps.
        crop_mode: "center", "squash" or "border".
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    crop_mode: str = "center"


@dataclass(frozen=True)
class DataSplit:
    """Loaders of batches ``(images, labels)``.

    Attributes:
        train: shuffled, augmented if asked for.
        val: always the same samples in the same order; None when there is only training data.
        num_classes: as the data define it; None for data sets of the caller's own.
        name: for messages and tables.
    """

    train: DataLoader[Any]
    val: DataLoader[Any] | None
    num_classes: int | None
    name: str


def list_datasets() -> list[str]:
    """The names :func:`load_data` knows, besides folders."""
    return ["digits", *sorted("torch/" + name for name in (*_TIMM, *_TORCHVISION))]


def input_spec(model: nn.Module | None = None, **overrides: Any) -> InputSpec:
    """The input a model expects: its timm ``pretrained_cfg``, else what torchvision's weights were trained with.

    Args:
        model: may be absent, and may be converted.
        **overrides: fields of :class:`InputSpec`, and ``img_size`` (pixels, height and width); None is ignored.

    >>> input_spec(img_size=32).input_size
    (3, 32, 32)
    """
    from timm.data import resolve_model_data_config

    given = {name: value for name, value in overrides.items() if value is not None}
    img_size = given.pop("img_size", None)
    values: dict[str, Any] = {}
    if declared(model):
        values = resolve_model_data_config(model)
    channels, height, width = InputSpec.input_size if model is None else zoo.input_size(model)
    if img_size is not None:
        height = width = int(img_size)
    values["input_size"] = (channels, height, width)
    values.update(given)
    channels = values["input_size"][0]
    for name in ("mean", "std"):
        values[name] = _per_channel(tuple(values.get(name, getattr(InputSpec, name))), channels)
    return InputSpec(**{name: value for name, value in values.items() if name in InputSpec.__dataclass_fields__})


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


def load_data(
    spec: Any = "",
    *,
    model: nn.Module | None = None,
    batch_size: int = 128,
    validation_batch_size: int | None = None,
    root: str | os.PathLike[str] | None = None,
    workers: int = 0,
    seed: int = 42,
    augment: bool | Mapping[str, Any] = True,
    download: bool = False,
    **overrides: Any,
) -> DataSplit:
    """Loaders for a data set, prepared as ``model`` expects its images.

    Args:
        spec: one of

            - ``"digits"``: scikit-learn's 1797 scanned digits, real and offline; 1347 to train, 450 to validate, split
              once and for all so that no seed lets a teacher's training samples into the validation;
            - a folder with ``train/`` and ``val/`` (or ``validation/``), one folder of images per class;
            - ``"torch/cifar10"`` and the other names of :func:`list_datasets`, read from ``root``;
            - a pair of datasets or of loaders (train, val), or one loader with training data only; used as they are.
        model: gives size, channels, mean and std (:func:`input_spec`), and the number of classes to check.
        batch_size: images per training batch.
        validation_batch_size: images per validation batch; ``batch_size`` when absent.
        root: folder of the data.
        workers: loader processes; data sets in memory (tensors, digits) get none.
        seed: of the training order.
        augment: timm's training augmentation, or a mapping of arguments for ``timm.data.create_transform``
            (``scale``, ``hflip``, ``auto_augment``, ...). Digits are never augmented.
        download: let torchvision fetch what is missing.
        **overrides: ``img_size``, ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``.

    Raises:
        DataError: nothing of that name, a folder without its parts, classes that differ from the model's.

    Example::

        data = load_data("torch/cifar10", model=model, root="~/data", batch_size=64, workers=4)
    """
    _check_overrides(overrides)
    sizes = (batch_size, validation_batch_size or batch_size)
    if isinstance(spec, DataSplit):
        return spec
    if not isinstance(spec, (str, os.PathLike)):
        return _own(spec, sizes, workers, seed)
    image = input_spec(model, **overrides)
    text, mode = os.fspath(spec), "L" if image.input_size[0] == 1 else "RGB"
    train: Dataset[Any]
    val: Dataset[Any]
    if text == "digits":
        train, val = _digits(image)
        classes, name = 10, "digits"
    elif text.startswith("torch/"):
        transforms = _transforms(image, augment)
        train, val, classes = _torchvision(text.removeprefix("torch/"), root, download, transforms, mode)
        name = text
    else:
        transforms = _transforms(image, augment)
        train, val, classes = _folder(text, root, transforms, mode)
        name = text or os.fspath(root or "")
    _check_classes(classes, getattr(model, "num_classes", None), name)
    return DataSplit(
        _loader(train, sizes[0], workers, seed, training=True), _loader(val, sizes[1], workers, seed), classes, name
    )


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    known = ["img_size", *InputSpec.__dataclass_fields__]
    for name in overrides:
        if name not in known:
            raise DataError(f"load_data has no argument {name!r}; {nearest(name, known)}")


def _check_classes(classes: int | None, outputs: Any, name: str) -> None:
    if classes is not None and isinstance(outputs, int) and outputs > 0 and outputs != classes:
        raise DataError(
            f"{name} has {classes} classes, the model has {outputs}; build the model with num_classes={classes} "
            f"(--num-classes {classes})"
        )


def _loader(dataset: Dataset[Any], batch_size: int, workers: int, seed: int, training: bool = False) -> DataLoader[Any]:
    shuffle = training and not isinstance(dataset, IterableDataset)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        # As timm does: a rest of one image would leave batch normalisation without a variance.
        drop_last=shuffle and len(dataset) >= batch_size,  # type: ignore[arg-type]
        num_workers=0 if in_memory(dataset) else workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed) if shuffle else None,
    )


def _own(spec: Any, sizes: tuple[int, int], workers: int, seed: int) -> DataSplit:
    """The caller's own datasets or loaders."""
    parts = tuple(spec) if isinstance(spec, (tuple, list)) else (spec, None)
    if len(parts) == 2 and isinstance(parts[0], (DataLoader, Dataset)):
        loaders = [
            part if isinstance(part, DataLoader) else _loader(part, size, workers, seed, training=index == 0)
            for index, (part, size) in enumerate(zip(parts, sizes, strict=True))
            if isinstance(part, (DataLoader, Dataset))
        ]
        if len(loaders) == 2 or parts[1] is None:
            return DataSplit(loaders[0], loaders[1] if len(loaders) == 2 else None, None, type(parts[0]).__name__)
    found = ", ".join(type(part).__name__ for part in parts if part is not None) or "nothing"
    raise DataError(
        f"data must be a name ({', '.join(list_datasets()[:2])}, ...), a folder, a pair (train, val) of torch Datasets "
        f"or DataLoaders, or one DataLoader; not {found}"
    )


class _Digits(Dataset[tuple[Tensor, int]]):
    """8x8 grey digits, enlarged batch by batch: at 224 pixels the whole set would take a gigabyte."""

    convsurgery_in_memory = True

    def __init__(self, images: Tensor, labels: Tensor, image: InputSpec) -> None:
        self.images, self.targets, self.image = images, labels, image
        self.mean = torch.tensor(image.mean).view(-1, 1, 1)
        self.std = torch.tensor(image.std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        grey = F.interpolate(self.images[list(indices)], size=self.image.input_size[1:], mode="bilinear")
        batch = (grey.expand(-1, self.image.input_size[0], -1, -1) - self.mean) / self.std
        return list(zip(batch, self.targets[list(indices)].tolist(), strict=True))


def _digits(image: InputSpec) -> tuple[_Digits, _Digits]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install 'convsurgery[demo]'") from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    parts = train_test_split(range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0)
    train, val = (_Digits(images[rows], labels[rows], image) for rows in map(sorted, parts))
    return train, val


def image_transform(image: InputSpec) -> Any:
    """From a PIL image to a normalised tensor (C, H, W), as in validation."""
    from timm.data import create_transform

    return create_transform(
        input_size=image.input_size,
        mean=image.mean,
        std=image.std,
        interpolation=image.interpolation,
        crop_pct=image.crop_pct,
        crop_mode=image.crop_mode,
    )


def _transforms(image: InputSpec, augment: bool | Mapping[str, Any]) -> tuple[Any, Any]:
    """Training and validation transforms from a PIL image to a normalised tensor."""
    from timm.data import create_transform

    if image.input_size[0] not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, the model takes {image.input_size[0]}; pass your own datasets")
    common = {"input_size": image.input_size, "mean": image.mean, "std": image.std}
    extra = dict(augment) if isinstance(augment, Mapping) else {}
    try:
        train = create_transform(
            **{**common, "interpolation": image.interpolation, **extra}, is_training=True, no_aug=not augment
        )
    except TypeError as error:
        raise DataError(f"augment: timm.data.create_transform does not take this: {error}") from error
    return train, image_transform(image)


class _Mode:
    """Brings an image to "L" or "RGB" before the transform. A class, since loaders with workers pickle it."""

    def __init__(self, mode: str, transform: Any) -> None:
        self.mode, self.transform = mode, transform

    def __call__(self, image: Any) -> Any:
        return self.transform(image.convert(self.mode))


def _torchvision(
    name: str, root: str | os.PathLike[str] | None, download: bool, transforms: tuple[Any, Any], mode: str
) -> tuple[Dataset[Any], Dataset[Any], int]:
    name = name.lower()
    if name not in _TIMM and name not in _TORCHVISION:
        raise DataError(f"no data set 'torch/{name}'; {nearest('torch/' + name, list_datasets())}")
    if root is None:
        raise DataError(f"torch/{name} needs the folder it lies in: root=... (--data-dir)")
    folder = Path(root).expanduser()
    sets: list[Dataset[Any]] = []
    for index, transform in enumerate(transforms):
        convert = _Mode(mode, transform)
        try:
            if name in _TIMM:
                from timm.data import create_dataset

                split = ("train", "validation")[index]
                made = create_dataset(f"torch/{name}", str(folder), split=split, download=download, transform=convert)
            else:
                import torchvision

                kind, *splits, _ = _TORCHVISION[name]
                # Imagenette refuses to download over what is there, so only ask when asked.
                fetch = {"download": True} if download else {}
                made = getattr(torchvision.datasets, kind)(str(folder), split=splits[index], transform=convert, **fetch)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"torch/{name} is not complete in {folder}: {error} "
                f"(download=True, --dataset-download, fetches it where there is a network)"
            ) from error
        sets.append(made)
    return sets[0], sets[1], _TIMM[name] if name in _TIMM else _TORCHVISION[name][3]


def _folder(
    text: str, root: str | os.PathLike[str] | None, transforms: tuple[Any, Any], mode: str
) -> tuple[Dataset[Any], Dataset[Any], int]:
    from timm.data import create_dataset

    folder = Path(root or "", text).expanduser()
    if not (text or root):
        raise DataError(f"no data given: a folder with train/ and val/, or a name; known: {', '.join(list_datasets())}")
    if not input_path(folder, DataError).is_dir():
        hint = nearest(text, list_datasets())
        raise DataError(f"no data set {text!r}: there is no folder {folder}; {hint}")
    found = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    parts = []
    for names in (_TRAIN_FOLDERS, _VAL_FOLDERS):
        part = next((folder / name for name in names if (folder / name).is_dir()), None)
        if part is None:
            listed = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") or "nothing"
            raise DataError(
                f"{folder} has no {names[0]}/ (looked for {', '.join(f'{name}/' for name in names)}; found {listed})"
            )
        parts.append(part)
    sets: list[Any] = []
    for part, transform in zip(parts, transforms, strict=True):
        try:
            sets.append(create_dataset("", str(part), search_split=False, transform=transform, input_img_mode=mode))
        except RuntimeError as error:
            raise DataError(f"no images in {part}: {error}") from error
    known, seen = (made.reader.class_to_idx for made in sets)
    for made in sets:
        made.reader = ImagesOnly(made.reader)
    if "" in known:
        raise DataError(f"{parts[0]} has images outside class folders; put each into {parts[0].name}/<class>/")
    strange = sorted(set(seen) - set(known))
    if strange:
        raise DataError(f"{parts[1]} has classes {parts[0]} lacks: {', '.join(strange[:8])}")
    if seen != known:
        # Each split numbers its own classes; a class missing in val would shift the labels of all after it.
        sets[1] = create_dataset(
            "", str(parts[1]), search_split=False, class_map=known, transform=transforms[1], input_img_mode=mode
        )
        sets[1].reader = ImagesOnly(sets[1].reader)
    return sets[0], sets[1], len(known)
