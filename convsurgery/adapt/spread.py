"""A part of a data set that stands for the whole: drawn by a seed, evenly over classes or folders."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

#: attribute of classes whose items are tensors that are there already
IN_MEMORY = "convsurgery_in_memory"

__all__ = ["Spread", "classes_of", "files_of", "in_memory", "map_style", "spread"]


@dataclass(frozen=True)
class Spread:
    """Which items of a set were taken.

    Attributes:
        indices: of the items, in the order in which they are used.
        total: how many there were.
        seed: they were drawn by; None where all were taken, or the first ones.
        over: "10 classes", "3 folders", or "".
    """

    indices: Sequence[int]
    total: int
    seed: int | None = None
    over: str = ""

    def __str__(self) -> str:
        if self.seed is None:
            return f"all {self.total:,} images"
        return (
            f"{len(self.indices):,} of {self.total:,} images, seed {self.seed}"
            + f", spread over {self.over}" * bool(self.over)
        )


def spread(
    total: int, count: int | None, seed: int, groups: Sequence[Hashable] | None = None, what: str = ""
) -> Spread:
    """``count`` of ``total`` items, as many from each group as from every other, as far as it has them.

    Args:
        total: number of items.
        count: how many to take; all, in their order, where it is None or there are no more.
        seed: of the draw; the same one takes the same items everywhere.
        groups: of each item, such as its class; None draws from the whole.
        what: the groups are, such as "classes".

    >>> spread(6, 4, 0, "aaaabb").indices.__len__()
    4
    >>> sorted("aaaabb"[i] for i in spread(6, 4, 0, "aaaabb").indices)
    ['a', 'a', 'b', 'b']
    """
    if count is None or count >= total:
        return Spread(range(total), total)
    draw = random.Random(f"convsurgery {seed}")
    members: dict[Hashable, list[int]] = {}
    for index in range(total):
        members.setdefault(None if groups is None else groups[index], []).append(index)
    for items in members.values():
        draw.shuffle(items)
    taken: list[int] = []
    # The smallest first: what they lack the others share.
    order = sorted(members.values(), key=lambda items: (len(items), draw.random()))
    for number, items in enumerate(order):
        taken += items[: (count - len(taken)) // (len(order) - number)]
    draw.shuffle(taken)
    over = f"{len(members):,} {what}" if what and len(members) > 1 else ""
    return Spread(taken, total, seed, over)


def classes_of(dataset: Dataset[Any]) -> list[int] | None:
    """The class of every item, where the set keeps a list of them; None where only loading the items would tell."""
    if isinstance(dataset, Subset):
        whole = classes_of(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [classes_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part or ()]
    size = _size(dataset)
    candidates = [_attribute(dataset, name) for name in ("targets", "labels", "_labels")]
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        candidates.append(dataset.tensors[1])
    if (samples := _samples(dataset)) is not None:
        candidates.append([label for _, label in samples])
    for found in candidates:
        labels = _whole_numbers(found)
        if labels is not None and len(labels) == size:
            return labels
    return None


def files_of(dataset: Dataset[Any]) -> list[str] | None:
    """The path of every item's file, where the set keeps a list of them."""
    if isinstance(dataset, Subset):
        whole = files_of(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [files_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [path for part in parts for path in part or ()]
    samples = _samples(dataset)
    return None if samples is None or len(samples) != _size(dataset) else [str(path) for path, _ in samples]


def in_memory(dataset: Any) -> bool:
    """Whether the items are tensors already: loading them in other processes would only copy them."""
    if isinstance(dataset, Subset):
        return in_memory(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(in_memory, dataset.datasets))
    return isinstance(dataset, TensorDataset) or getattr(type(dataset), IN_MEMORY, False) is True


def map_style(dataset: Any) -> bool:
    """Whether items can be asked for by their numbers, and their number is known."""
    return isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset) and _size(dataset) is not None


def _size(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _attribute(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name, None)
    except Exception:  # a property of somebody's class may raise anything
        return None


def _samples(dataset: Any) -> list[tuple[Any, Any]] | None:
    """Pairs of file and class, as torchvision's folders and timm's readers keep them."""
    for owner in (dataset, _attribute(dataset, "reader")):
        for name in ("samples", "imgs"):
            found = _attribute(owner, name)
            if isinstance(found, list) and found and all(isinstance(item, tuple) and len(item) == 2 for item in found):
                return found
    return None


def _whole_numbers(values: Any) -> list[int] | None:
    if isinstance(values, Tensor) or type(values).__module__ == "numpy":
        if values.ndim != 1 or "float" in str(values.dtype):
            return None
        values = values.tolist()
    if isinstance(values, Mapping) or not isinstance(values, Sequence) or isinstance(values, str):
        return None
    return list(values) if all(isinstance(value, int) for value in values) else None
