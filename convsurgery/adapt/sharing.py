"""Validation batches over several processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["share"]


def share(loader: DataLoader[Any], accelerator: Accelerator, seed: int) -> Iterable[Any]:
    """This process's part of the validation batches, none twice.

    Accelerate's sharding pads the last round with samples from the front and drops them by the data set's length,
    which a sampler that takes a part of the set makes wrong.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if world == 1:
        return loader
    if loader.batch_sampler is None:
        return _Every(loader, rank, world)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = list(loader.batch_sampler)
    return DataLoader(
        loader.dataset,
        batch_sampler=batches[rank::world],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


class _Every:
    """Every ``step``-th batch of a loader without a sampler."""

    def __init__(self, loader: Iterable[Any], start: int, step: int) -> None:
        self.loader, self.start, self.step = loader, start, step

    def __iter__(self) -> Any:
        return itertools.islice(iter(self.loader), self.start, None, self.step)
