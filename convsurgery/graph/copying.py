"""Copies of models, also of those that ``copy.deepcopy`` alone refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["computed_attributes", "copy_model"]

Model = TypeVar("Model", bound=nn.Module)


def computed_attributes(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> dict[int, Any]:
    """A memo for ``copy.deepcopy`` that puts ``replace(tensor)`` in place of tensors that carry autograd history.

    Old-style weight norm and pruning leave such tensors on modules; deepcopy refuses them.
    """
    return {
        id(value): replace(value.detach())
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


def copy_model(model: Model) -> Model:
    """An independent copy of ``model``, shared tensors shared in it too."""
    return copy.deepcopy(model, computed_attributes(model, Tensor.clone))
