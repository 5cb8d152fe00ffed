"""One at a time: what FX and Python keep for the whole process is changed by one thread, and others do not notice."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["alone", "quietly"]

_lock = threading.RLock()


def _fresh() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # Whoever held it in the parent does not exist in the child.
    os.register_at_fork(after_in_child=_fresh)


@contextmanager
def alone() -> Iterator[None]:
    """No other thread is inside meanwhile; one that comes waits. The same thread may enter again."""
    with _lock:
        yield


@contextmanager
def quietly() -> Iterator[None]:
    """Alone, without warnings, and without the failures that fake tensors log although they are handled here.

    Filters of warnings and levels of loggers belong to the process: two threads that both set them and put them back
    would leave one's setting behind for ever.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with _lock:
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logger.setLevel(level)
