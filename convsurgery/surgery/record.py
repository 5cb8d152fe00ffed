"""What was done to a model, carried by the model itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from convsurgery import zoo
from convsurgery.errors import ModelError
from convsurgery.operators import Start
from convsurgery.surgery.plan import Entry, Plan

__all__ = ["Record", "add_to_record", "changed_names", "record", "restore_record", "set_record", "unwrap", "weights_of"]

_ATTRIBUTE = "_convsurgery_record"


@dataclass(frozen=True)
class Record:
    """Everything needed to make the converted model's structure again from its base.

    Attributes:
        plans: carried out in this order.
        norms: new epsilon of every BatchNorm that absorbed a gain, by name.
        fused: whether ``fuse`` folded constants and BatchNorms afterwards.
    """

    plans: tuple[Plan, ...]
    norms: Mapping[str, float] = field(default_factory=dict)
    fused: bool = False

    @property
    def edits(self) -> tuple[Entry, ...]:
        """All replacements, in the order they were made."""
        return tuple(entry for plan in self.plans for entry in plan.edits)

    @property
    def starts(self) -> dict[str, Start]:
        """How each replaced site began, by name."""
        return {entry.site.name: entry.start for entry in self.edits if entry.start is not None}

    def __str__(self) -> str:
        text = "\n\n".join(str(plan) for plan in self.plans)
        return text + ("\nfused for deployment" if self.fused else "")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or ``torch.compile``; ModelError for what is no model."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is a torch.nn.Module, not a value of type {type(model).__name__}")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def record(model: nn.Module) -> Record | None:
    """What convsurgery did to ``model``; None for a model it did not convert."""
    found = getattr(unwrap(model), _ATTRIBUTE, None)
    return found if isinstance(found, Record) else None


def weights_of(model: nn.Module) -> zoo.Origin:
    """Where the weights of ``model`` come from, as far as it is known: by itself, or by the plan it was made by."""
    done = record(model)
    known = done.plans[-1].weights if done is not None and done.plans else ""
    return zoo.origin_of(unwrap(model), before=zoo.Origin.parse(known) if known else None)


def set_record(model: nn.Module, value: Record) -> None:
    object.__setattr__(model, _ATTRIBUTE, value)


def restore_record(model: nn.Module, value: Record | None) -> None:
    """Set the record back; None for a model that had none."""
    if value is not None:
        set_record(model, value)
    else:
        vars(model).pop(_ATTRIBUTE, None)


def add_to_record(model: nn.Module, plan: Plan, norms: Mapping[str, float], before: nn.Module) -> None:
    """Note on ``model`` that ``plan`` was carried out on ``before`` (the same object but for a root convolution)."""
    old = record(before) or Record(())
    set_record(model, dataclasses.replace(old, plans=(*old.plans, plan), norms={**old.norms, **norms}))


def changed_names(done: Record) -> set[str]:
    """Names of modules that differ from the base's: replaced, rescaled or folded away."""
    changed = {name for entry in done.edits for name in entry.site.names} | set(done.norms)
    for block in (entry.block for entry in done.edits if entry.block is not None):
        changed |= {*block.members, *(() if block.chain else (block.owner,))}
    if done.fused:
        changed |= {entry.site.batchnorm for entry in done.edits if entry.site.batchnorm}
    return changed
