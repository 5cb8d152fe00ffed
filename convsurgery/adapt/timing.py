"""Wall-clock times of two ways to compute the same, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

__all__ = ["milliseconds", "now"]


def milliseconds(first: Callable[[], object], second: Callable[[], object], rounds: int = 5) -> tuple[float, float]:
    """Medians over interleaved calls, after one of each to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for call, kept in zip((first, second), times, strict=True):
            _wait()
            begun = time.perf_counter()
            call()
            _wait()
            if number:
                kept.append((time.perf_counter() - begun) * 1e3)
    return median(times[0]), median(times[1])


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def now(near: Tensor) -> float:
    """Seconds, once the device of ``near`` has done what it was given."""
    if near.device.type == "cuda":
        torch.cuda.synchronize(near.device)
    return time.perf_counter()
