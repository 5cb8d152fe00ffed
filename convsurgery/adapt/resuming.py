"""What a resumed run must have in common with the one it goes on from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from convsurgery.adapt.config import FinetuneConfig
from convsurgery.adapt.data import DataSplit
from convsurgery.adapt.spread import classes_of, files_of, map_style
from convsurgery.errors import TrainingError

__all__ = ["check_resumed", "identity"]

# A resumed run may change these; everything else decides the numbers it computes.
_FREE = {"epochs", "log_interval", "workers", "validation_batch_size", "device", "divergence"}
#: values of a tensor that tell it from another
_SAMPLE = 64


def identity(split: DataSplit, teacher: nn.Module | None, updates_per_epoch: int) -> dict[str, Any]:
    """What a run is of besides its settings: its data, its teacher, and how long an epoch is, as plain values."""
    found: dict[str, Any] = {"updates per epoch": updates_per_epoch, "data": split.name}
    for role, loader in (("training", split.train), ("validation", split.val)):
        dataset = None if loader is None else loader.dataset
        known = dataset is not None and map_style(dataset)
        found[f"{role} images"] = len(dataset) if known else None  # type: ignore[arg-type]
        found[f"{role} set"] = _digest_of(dataset) if known else None
    found["teacher"] = None if teacher is None else _digest_of_model(teacher)
    return found


def check_resumed(then: Mapping[str, Any], config: FinetuneConfig, distilling: bool, now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings, other data or another teacher than the run began with.

    Args:
        then: the training state.
        config, distilling, now: of this run; ``now`` is its :func:`identity`.

    Raises:
        TrainingError: naming every difference; more epochs are none.
    """
    mine = {**config.to_dict(), "distilling": distilling}
    # A setting that the version before did not have was at its default.
    theirs = {**FinetuneConfig().to_dict(), **then["config"], "distilling": then["distilling"]}
    changed = [
        f"{name} {theirs[name]} → {mine[name]}" for name in mine if name not in _FREE and mine[name] != theirs[name]
    ]
    if mine["epochs"] < theirs["epochs"]:
        changed.append(f"epochs {theirs['epochs']} → {mine['epochs']}, where it can only be made longer")
    changed += _other_data(then.get("identity") or {}, now)
    if changed:
        raise TrainingError(
            f"a resumed run keeps the settings it began with; changed: {', '.join(changed)}. "
            f"To train on with others, load last/ and begin a new run"
        )


def _other_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """States of earlier versions say nothing here, and what cannot be known is not compared."""
    pairs = {name: (then.get(name), now.get(name)) for name in now}
    differing = [name for name, (old, new) in pairs.items() if None not in (old, new) and old != new]
    told = [name for name in differing if name in ("updates per epoch", "training images", "validation images")]
    changed = [f"{name} {pairs[name][0]} → {pairs[name][1]}" for name in told]
    for role in ("training", "validation"):
        if f"{role} set" in differing and f"{role} images" not in differing:
            old, new = pairs["data"]
            changed.append(f"other {role} images" + (f" ({old} → {new})" if old != new else ""))
    return changed + ["another teacher"] * ("teacher" in differing)


def _digest_of(dataset: Any) -> str | None:
    """A digest of which items a set holds, without loading them: of names and classes, or of values; None for others.

    The folder a set lies in takes no part, so that it can be moved.
    """
    files, classes = files_of(dataset), classes_of(dataset)
    digest = hashlib.sha256()
    if files is not None:
        digest.update("\n".join("/".join(PurePath(file).parts[-2:]) for file in files).encode(errors="surrogateescape"))
    tensors = _tensors(dataset)
    for tensor in tensors:
        digest.update(_sampled(tensor))
    if classes is not None:
        digest.update(repr(classes).encode())
    return digest.hexdigest() if files is not None or tensors or classes is not None else None


def _tensors(dataset: Any) -> list[Tensor]:
    if isinstance(dataset, Subset):
        return [*_tensors(dataset.dataset), torch.as_tensor(list(dataset.indices))]
    return list(dataset.tensors) if isinstance(dataset, TensorDataset) else []


def _digest_of_model(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode() + _sampled(value))
    return digest.hexdigest()


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // _SAMPLE)].cpu().contiguous()
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + bytes(some.view(torch.uint8).numpy().data)
