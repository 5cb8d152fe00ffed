"""The images and labels a model is evaluated on, from whatever fine-tuning takes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convsurgery.adapt.data import DataSplit, load_data
from convsurgery.adapt.images import check_number, dataset_behind, part_of
from convsurgery.adapt.spread import Spread, in_memory, spread
from convsurgery.errors import DataError

__all__ = ["Batches", "validation_data"]

_BATCH = 128


class Batches:
    """Batches ``(images, labels)``; says which they were once they were gone through.

    Args:
        source: gives them.
        limit: samples to stop after; None for all.
        taken: which part of a set the source gives; None for a source that is used as it was given.
    """

    def __init__(self, source: Iterable[Any], limit: int | None = None, taken: Spread | None = None) -> None:
        self.source, self.limit, self.taken, self.seen = source, limit, taken, 0

    def __iter__(self) -> Iterator[Any]:
        self.seen = 0
        for batch in self.source:
            part = batch if self.limit is None else _cut(batch, self.limit - self.seen)
            self.seen += _length(part)
            yield part
            if self.seen == self.limit:
                return

    def __str__(self) -> str:
        if self.taken is not None:
            return str(self.taken)
        first = "the first " if self.limit is not None and self.seen == self.limit else ""
        return f"{first}{self.seen:,} images, as they were given"


def validation_data(
    data: Any,
    model: nn.Module,
    images: int | None,
    seed: int,
    data_dir: str | os.PathLike[str] | None,
    workers: int,
) -> Batches:
    """The validation part of ``data``, or a part of that; arguments and errors as of ``evaluate``."""
    check_number("images", images, least=1)
    check_number("seed", seed, least=None)
    if isinstance(data, (str, os.PathLike)):
        data = load_data(data, model=model, root=data_dir, batch_size=_BATCH, workers=workers, augment=False)
    drawn = isinstance(data, DataSplit)
    if isinstance(data, DataSplit):
        data = (data.train, data.val)
    if isinstance(data, Sequence) and len(data) == 2 and isinstance(data[0], (DataLoader, Dataset)):
        data = data[1]
        if data is None:
            raise DataError("there is no validation part in these data; give the loader to evaluate on itself")
    if isinstance(data, Dataset):
        drawn, data = True, DataLoader(data, _BATCH, num_workers=0 if in_memory(data) else workers)
    if isinstance(data, DataLoader):
        dataset = dataset_behind(data)
        if dataset is not data and images is None and not data.drop_last:
            return Batches(data, taken=spread(len(dataset), None, seed))
        if dataset is not data and images is not None and drawn:
            source, taken = part_of(dataset, images, seed, data)
            return Batches(source, taken=taken)
    if not isinstance(data, Iterable):
        raise DataError(
            "data must be a name, a folder, a pair (train, val) of datasets or loaders, a dataset, a loader or another "
            f"iterable of batches, not {type(data).__name__}"
        )
    return Batches(data, images)


def _cut(batch: Any, most: int) -> Any:
    if isinstance(batch, (tuple, list)) and all(isinstance(part, Tensor) for part in batch):
        return type(batch)(part[:most] for part in batch)
    return batch


def _length(batch: Any) -> int:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    return len(first) if isinstance(first, Tensor) else 0
