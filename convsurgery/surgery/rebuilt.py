"""Is what was saved what ``load`` gives? The folder is read back at once, and the two models are held side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from convsurgery import zoo
from convsurgery.graph import own_method
from convsurgery.surgery.record import record

__all__ = ["difference", "wrapped_inside"]

#: relative error of outputs that another memory layout of the same weights may make, by size of a number in bytes
_ROUNDING = {2: 2e-2, 4: 1e-3, 8: 1e-9}
_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_state_dict_hooks": "a state_dict hook",
    "_state_dict_pre_hooks": "a state_dict pre-hook",
    "_load_state_dict_pre_hooks": "a load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "a load_state_dict post-hook",
}


def wrapped_inside(model: nn.Module) -> str | None:
    """The name of a converted model inside ``model``, whose own record would not be saved."""
    return next((name for name, part in model.named_modules() if name and record(part) is not None), None)


def difference(model: nn.Module, loaded: nn.Module) -> str | None:
    """What ``model`` has or does that ``loaded``, built again and filled from its weights, has not; None if nothing.

    Hooks and methods that somebody hung on single modules are compared, then the outputs on one random input where
    the model runs on its usual ones.
    """
    return _hung(model, loaded) or _outputs_differ(model, loaded)


def _hung(model: nn.Module, loaded: nn.Module) -> str | None:
    twins = dict(loaded.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        twin, label = twins.get(name), name or "the model"
        if twin is None:
            return f"{label} is not in it"
        if type(module).__name__ != type(twin).__name__:
            return f"{label} is a {type(module).__name__} here and a {type(twin).__name__} there"
        for table, what in _HOOKS.items():
            ours, theirs = (_foreign(getattr(one, table, None)) for one in (module, twin))
            if ours > theirs:
                return f"{label} carries {what}, which no file holds"
        method = own_method(module)
        if method is not None and own_method(twin) != method:
            return f"{method} of {label} was replaced on the instance, which no file holds"
    return None


def _foreign(table: Any) -> int:
    """How many hooks there are but for those that training and measuring here set for a while."""
    return sum(
        not str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("convsurgery.")
        for hook in (table or {}).values()
    )


def _outputs_differ(model: nn.Module, loaded: nn.Module) -> str | None:
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta:
        return None
    try:
        usual = zoo.example_inputs(model)
    except Exception:  # a model of one's own may describe itself in any way
        return None
    generator = torch.Generator().manual_seed(0)
    inputs = tree_map_only(
        Tensor, lambda x: torch.rand(x.shape, generator=generator).to(x.device, x.dtype), tuple(usual)
    )
    try:
        ours = _outputs(model, inputs)
    except Exception:  # it takes something else, which nobody said
        return None
    try:
        theirs = _outputs(loaded.to(parameter.device), inputs)
    except Exception as error:
        return f"built again it does not run: {error!s:.200}"
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return "built again it has outputs of other shapes"
    for one, other in zip(ours, theirs, strict=True):
        if not _close(one, other):
            return "built again it has other outputs: something that no file holds is at work"
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype:
        return False
    if torch.equal(one, other) or not one.is_floating_point():
        return bool(torch.equal(one, other))
    bound = _ROUNDING.get(one.element_size(), 0.1)
    a, b = one.double(), other.double()
    scale = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 1.0
    return bool(torch.allclose(a, b, rtol=0, atol=bound * scale, equal_nan=True))


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with _evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model(*tree_map_only(Tensor, Tensor.clone, inputs))
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; the flags are as before afterwards."""
    changed = [module for module in model.modules() if module.training]
    try:
        for module in changed:
            module.training = False
        yield
    finally:
        for module in changed:
            module.training = True
