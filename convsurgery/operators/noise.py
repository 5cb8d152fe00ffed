"""Fixed random tensors that come out the same on every device, platform and version."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["gaussian", "ternary", "uniform"]

#: Gaussian values are multiples of this, so that logarithms that differ in their last bit do not show.
_GRID = 2.0**-16


def _bits(shape: Sequence[int], seed: int, stream: str) -> np.ndarray:
    """53 random bits for each value: the raw output of Philox, which numpy promises not to change."""
    source = np.random.Philox(key=(zlib.crc32(stream.encode()) << 64) | seed)
    raw: np.ndarray = source.random_raw(math.prod(shape))
    return (raw >> np.uint64(11)).reshape(tuple(shape))


def _unit(shape: Sequence[int], seed: int, stream: str) -> Tensor:
    """Values in (0, 1), float64; the centres of 2^52 cells."""
    cells = (_bits(shape, seed, stream) >> np.uint64(1)).astype(np.float64)
    return torch.from_numpy((cells + 0.5) * 2.0**-52)


def uniform(shape: Sequence[int], seed: int, stream: str = "") -> Tensor:
    """Values in (-1, 1), float64. ``stream`` (a layer's name) gives each layer values of its own."""
    return _unit(shape, seed, stream) * 2 - 1


def gaussian(shape: Sequence[int], seed: int, stream: str = "") -> Tensor:
    """Standard normal values in float64, by inversion."""
    values: Tensor = torch.special.ndtri(_unit(shape, seed, stream))
    return (values / _GRID).round() * _GRID


def ternary(shape: Sequence[int], seed: int, zeros: float, stream: str = "") -> Tensor:
    """Filters of -1, 0 and 1 in float64, (m, ...): each has the same number of zeros, the rest are signs.

    ``zeros`` is their share, rounded down to whole numbers, so that at least one value of each filter is not 0.
    """
    count = math.prod(shape[1:])
    unit = _unit((shape[0], count), seed, stream)
    # The places with the largest draws are left in; the parity of a cell is as good as another coin.
    kept = count - min(int(zeros * count), count - 1)
    places = unit.argsort(dim=1, descending=True, stable=True)[:, :kept]
    signs = torch.from_numpy((_bits((shape[0], count), seed, stream) & np.uint64(1)).astype(np.float64)) * 2 - 1
    filters = torch.zeros(shape[0], count, dtype=torch.float64)
    return filters.scatter_(1, places, signs.gather(1, places)).reshape(tuple(shape))
