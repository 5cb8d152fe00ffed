"""Images to fit to, and others to measure on: what is of one file stays on one side."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch
from torch import Tensor

from convsurgery.errors import DataError

__all__ = ["FITTED", "Holdout", "hold_out", "sources_of"]

#: images that are held out where there are as many
LEAST = 128
#: images that fits are left with before more are held out than a quarter
FITTED = 64
_QUARTER = 4
#: names of crops: PHOTO_crop3, PHOTO-tile-0-2, ...
_MARKED = re.compile(
    r"(?P<head>.+?)[ _.\-]+(?:aug|crop|part|patch|piece|tile|view|window)s?(?:[ _.\-]*\d+)*(?:[ _.\-]*x[ _.\-]*\d+)?",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(?P<head>.+?)[ _.\-]+\(?(?P<number>\d{1,3})\)?")
#: numbered names are taken for crops where no file would have more of them, and there are so many files
_MOST_CROPS, _LEAST_FILES = 32, 8


@dataclass(frozen=True)
class Holdout:
    """Both sides of a split.

    Attributes:
        fit, held_out: batches.
        total, count: how many images there are, and how many of them are held out.
        files: how many sources they come from; None where every image is its own.
    """

    fit: Iterable[Tensor]
    held_out: Iterable[Tensor]
    total: int
    count: int
    files: int | None


def hold_out(images: Iterable[Tensor], sources: Sequence[Hashable] | None = None, least: int = 0) -> Holdout:
    """Split images by a seeded draw: at least a quarter, and 128 where there are as many, are held out.

    Args:
        images: batches, the same ones in every pass.
        sources: of each image, such as the file it was cropped from; what has one source stays on one side.
        least: more than 128 that are wanted, as far as 64 are left to fit to.

    Raises:
        DataError: for fewer than 8 images, sources that are not one for each image, or all from one source.
    """
    total = sum(len(batch) for batch in images)
    if total < 2 * _QUARTER:
        raise DataError(
            f"auto needs images to fit to and others to measure on; {total} are too few, 200 or more are good"
        )
    if sources is not None and len(sources) != total:
        raise DataError(f"groups must be one for each image: {len(sources)} for {total} images")
    wanted = max(total // _QUARTER, min(max(LEAST, least), total - FITTED))
    members: dict[Hashable, list[int]] = {}
    for index in range(total):
        members.setdefault(index if sources is None else sources[index], []).append(index)
    groups = list(members.values())
    random.Random("convsurgery held out").shuffle(groups)
    mask, count = torch.zeros(total, dtype=torch.bool), 0
    for group in groups:
        # A large group must not take what fits need.
        if count < wanted and total - count - len(group) >= total // _QUARTER:
            mask[group] = True
            count += len(group)
    if not count:
        raise DataError(
            f"most of the {total} images come from one file: nothing is left to measure on that a fit has not seen; "
            "give images of several files"
        )
    files = len(groups) if len(groups) < total else None
    return Holdout(_Part(images, ~mask), _Part(images, mask), total, count, files)


class _Part:
    def __init__(self, images: Iterable[Tensor], mask: Tensor) -> None:
        self.images, self.mask = images, mask

    def __iter__(self) -> Iterator[Tensor]:
        seen = 0
        for batch in self.images:
            part = batch[self.mask[seen : seen + len(batch)].to(batch.device)]
            seen += len(batch)
            if len(part):
                yield part


def sources_of(files: Sequence[str]) -> list[str]:
    """The file that each image was made from, by its name: crops are named after their picture.

    A word such as "crop" or "tile" behind the picture's name tells. Mere numbers do where they count from 0 or 1 for
    each of several pictures of a folder, none has more than 32, and there are 8 pictures or more; elsewhere a number
    may as well be that of a picture.

    >>> sources_of(["a/cat_crop1.png", "a/cat_crop2.png", "a/dog.png"])
    ['a/cat', 'a/cat', 'a/dog']
    """
    paths = [PurePath(file) for file in files]
    marked = [_MARKED.fullmatch(path.stem) for path in paths]
    stems = [path.stem if found is None else found["head"] for path, found in zip(paths, marked, strict=True)]
    keys = [str(path.with_name(stem)) for path, stem in zip(paths, stems, strict=True)]
    numbers: dict[str, dict[str, list[int]]] = {}
    heads: list[str | None] = []
    for path, key in zip(paths, keys, strict=True):
        found = _NUMBERED.fullmatch(PurePath(key).name)
        head = None if found is None else str(path.with_name(found["head"]))
        heads.append(head)
        if found is not None and head is not None:
            numbers.setdefault(str(path.parent), {}).setdefault(head, []).append(int(found["number"]))
    crops = {head for pictures in numbers.values() if len(pictures) > 1 and _counted(pictures) for head in pictures}
    merged = [head if head is not None and head in crops else key for head, key in zip(heads, keys, strict=True)]
    return merged if len(set(merged)) >= _LEAST_FILES else keys


def _counted(pictures: dict[str, list[int]]) -> bool:
    """Whether the numbers behind nearly all names count from 0 or 1."""
    several = [sorted(found) for found in pictures.values() if len(found) > 1]
    if not several or max(map(len, several)) > _MOST_CROPS:
        return False
    kinds = Counter(found in (list(range(len(found))), list(range(1, len(found) + 1))) for found in several)
    return kinds[True] >= 0.9 * len(several)
