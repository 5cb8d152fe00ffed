"""What a share counted on some images says about all images."""

from __future__ import annotations

import importlib
import math
from typing import Any

from convsurgery.errors import DataError

__all__ = ["clopper_pearson", "images_needed"]

#: probability that an interval covers the true share, whatever that is
LEVEL = 0.95


def clopper_pearson(hits: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact two-sided confidence interval of a share (Clopper, Pearson 1934, Biometrika 26, 404).

    Args:
        hits: out of ``total``.
        total: at least 1.
        level: probability at least that the interval covers the true share.

    Returns:
        Its ends, from 0 to 1.

    Raises:
        DataError: for hits below 0 or above the total, or a total below 1.

    >>> tuple(round(end, 4) for end in clopper_pearson(8, 10))
    (0.4439, 0.9748)
    """
    if not 0 <= hits <= total or total < 1:
        raise DataError(f"{hits} of {total} is no share of anything")
    inverse: Any = importlib.import_module("scipy.special").betaincinv
    tail = (1 - level) / 2
    low = float(inverse(hits, total - hits + 1, tail)) if hits else 0.0
    high = float(inverse(hits + 1, total - hits, 1 - tail)) if hits < total else 1.0
    return low, high


def images_needed(least: float, rate: float = 1.0, level: float = LEVEL) -> int | None:
    """The fewest images of which a share ``rate`` shows that at least ``least`` of all do; None where none suffice.

    >>> images_needed(0.98)
    183
    """
    if least <= 0:
        return 1
    if rate <= least:
        return None

    def shows(total: int) -> bool:
        return clopper_pearson(math.floor(rate * total + 1e-9), total, level)[0] >= least

    most = 1
    while not shows(most):
        most *= 2
        if most > 1 << 40:
            return None
    low = most // 2
    while most - low > 1:
        middle = (low + most) // 2
        low, most = (low, middle) if shows(middle) else (middle, most)
    return most
