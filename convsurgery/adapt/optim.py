"""timm's optimizers and schedules, made from the settings of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convsurgery.adapt.config import FinetuneConfig
from convsurgery.errors import SettingsError

__all__ = ["carry_over", "make_optimizer", "make_scheduler"]


def make_optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """The optimizer over the parameters that require a gradient, biases and norms without weight decay.

    Raises:
        SettingsError: the optimizer does not take these settings, or a package it needs is missing.
    """
    from timm.optim import create_optimizer_v2

    extra: dict[str, Any] = {"eps": config.opt_eps, "betas": config.opt_betas, "layer_decay": config.layer_decay}
    extra = {name: value for name, value in extra.items() if value is not None}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, config.opt, config.lr, config.weight_decay, config.momentum, **extra
        )
    except (ValueError, TypeError, ImportError, AssertionError) as error:
        raise SettingsError(f"optimizer {config.opt!r} cannot be made with these settings: {error}") from error
    return optimizer


#: steps that optimizers count in their groups
_COUNTERS = ("step", "lookahead_step")


def carry_over(before: torch.optim.Optimizer, after: torch.optim.Optimizer) -> None:
    """Give an optimizer over fewer parameters what the one before knew of them.

    That is more than the state of each parameter: lamb and lookahead count steps in their groups, and lookahead stands
    around another.
    """
    pairs = [(before, after)]
    inner = [getattr(each, "_base_optimizer", None) for each in (before, after)]
    if all(isinstance(each, torch.optim.Optimizer) for each in inner):
        pairs.append((inner[0], inner[1]))  # type: ignore[arg-type]
    for old, new in pairs:
        kept = {id(p) for group in new.param_groups for p in group["params"]}
        new.state.update({p: state for p, state in old.state.items() if id(p) in kept})
        for group in new.param_groups:
            own = {id(p) for p in group["params"]}
            like = next((each for each in old.param_groups if own & {id(p) for p in each["params"]}), {})
            group.update({key: value for key, value in like.items() if key not in group or key in _COUNTERS})


def make_scheduler(optimizer: torch.optim.Optimizer, config: FinetuneConfig, updates_per_epoch: int) -> Any:
    """A timm schedule (``step(epoch)`` and ``step_update(update)``), or None for ``sched="none"``.

    Raises:
        SettingsError: the schedule does not take these settings, or this timm does not know it.
    """
    if config.sched == "none":
        return None
    from timm.scheduler import create_scheduler_v2

    extra = {} if config.decay_epochs is None else {"decay_epochs": config.decay_epochs}
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            config.sched,
            num_epochs=config.epochs,
            decay_milestones=list(config.decay_milestones),
            decay_rate=config.decay_rate,
            min_lr=config.min_lr,
            # Above lr it would be a jump start, not a warm-up.
            warmup_lr=min(config.warmup_lr, config.lr),
            warmup_epochs=config.warmup_epochs,
            step_on_epochs=not config.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
            **extra,
        )
    except (ValueError, AssertionError) as error:
        raise SettingsError(f"schedule {config.sched!r} cannot be made with these settings: {error}") from error
    if scheduler is None:
        raise SettingsError(f"this version of timm has no schedule {config.sched!r}")
    return scheduler
