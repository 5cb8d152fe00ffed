"""What a forward is called with: positional arguments, and behind them those by keyword."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from convsurgery.errors import ModelError

__all__ = ["Keywords", "as_arguments", "call"]


class Keywords(dict[str, Any]):
    """Arguments by keyword; the last of a forward's arguments where there are any."""


register_pytree_node(
    Keywords,
    lambda held: (list(held.values()), list(held)),
    lambda values, names: Keywords(zip(names, values, strict=True)),
    serialized_type_name="convsurgery.Keywords",
)


def as_arguments(example: Any) -> tuple[Any, ...]:
    """``example_inputs`` as arguments: a tensor, positional ones in a sequence, or a mapping of those by keyword.

    Raises:
        ModelError: for anything else.
    """
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, Mapping):
        if not all(isinstance(name, str) for name in example):
            raise ModelError("example_inputs given by keyword are a mapping from names to tensors")
        return (Keywords(example),)
    if isinstance(example, Sequence) and not isinstance(example, str | bytes):
        return tuple(example)
    raise ModelError(
        "example_inputs are a tensor, the forward's positional arguments, or a mapping of arguments by keyword, not a "
        f"value of type {type(example).__name__}"
    )


def call(model: nn.Module, arguments: Sequence[Any]) -> Any:
    """``model`` called with them."""
    if arguments and isinstance(arguments[-1], Keywords):
        return model(*arguments[:-1], **arguments[-1])
    return model(*arguments)
