"""A bound on what is allocated while something is built that a file described."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convsurgery.errors import ModelError

__all__ = ["Budget"]

_BY_SIZE = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn})
_FACTORIES = _BY_SIZE | {torch.full, torch.arange, torch.linspace, torch.eye, torch.randint, torch.randperm}


class Budget(TorchFunctionMode):
    """Inside it new tensors are counted, and refused before they are allocated.

    A file of a few kilobytes can ask for a model of terabytes, or of millions of layers.

    Args:
        elements: of all new tensors together.
        tensors: how many of them.

    Raises:
        ModelError: at the tensor that is too much.
    """

    def __init__(self, elements: int, tensors: int) -> None:
        super().__init__()
        self.elements, self.tensors = elements, tensors

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _FACTORIES:
            return func(*args, **kwargs)
        asked = _asked(func, args, kwargs)
        self._spend(asked)
        made = func(*args, **kwargs)
        if not asked and isinstance(made, Tensor):
            self._spend(made.numel())
        return made

    def _spend(self, elements: int) -> None:
        self.elements -= elements
        if elements:
            self.tensors -= 1
        if self.elements < 0 or self.tensors < 0:
            raise ModelError("it asks for far more memory than its weights take: nothing was built")


def _asked(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> int:
    """Elements of a tensor to come, as far as its arguments tell them."""
    size = kwargs.get("size", args[0] if args and isinstance(args[0], list | tuple | torch.Size) else args)
    if func is torch.full:
        size = kwargs.get("size", args[0] if args else ())
    elif func not in _BY_SIZE:
        return 0
    numbers = size if isinstance(size, list | tuple | torch.Size) else (size,)
    return math.prod(numbers) if all(type(number) is int and number >= 0 for number in numbers) else 0
