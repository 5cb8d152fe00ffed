"""Interleaved timing and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["medians"]


def medians(calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each call; every round runs all in turn, so that drift of the machine hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            if number >= warmup:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}
