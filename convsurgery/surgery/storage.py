"""A converted model as a folder: ``model.safetensors`` and ``convsurgery.json``. Nothing in it is ever executed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convsurgery import models as models  # its networks may be what is loaded
from convsurgery import zoo
from convsurgery.errors import ConvSurgeryError, ModelError, StorageError
from convsurgery.graph import aliases, copy_model
from convsurgery.surgery.apply import apply_
from convsurgery.surgery.fuse import fuse
from convsurgery.surgery.plan import Plan
from convsurgery.surgery.record import Record, record, set_record, unwrap

__all__ = ["CONFIG", "FORMAT", "WEIGHTS", "load", "load_weights", "save"]

FORMAT = 1
CONFIG = "convsurgery.json"
WEIGHTS = "model.safetensors"


def save(model: nn.Module, directory: str | os.PathLike[str], *, base: str | zoo.Base | None = None) -> Path:
    """Write ``model`` as a folder that :func:`load` reads back, bit for bit, buffers and shared tensors included.

    Args:
        model: converted or not; also wrapped by DistributedDataParallel or ``torch.compile``.
        directory: made when absent; files of an earlier save are replaced once the new ones are complete.
        base: the timm or torchvision model it was built from. Found out by itself for models built by name, by
            ``timm.create_model`` or by a torchvision builder. A model of the user's own class has none: ``load`` then
            asks for one.

    Returns:
        The folder's path.

    Raises:
        StorageError: when the folder cannot be written.
    """
    model = unwrap(model)
    done = record(model) or Record(())
    known = zoo.Base(base) if isinstance(base, str) else base or zoo.identify(model, ignore=_changed(model, done))
    config = {
        "format": FORMAT,
        "base": None if known is None else known.to_json(),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "plans": [plan.to_dict() for plan in done.plans],
        "norms": dict(done.norms),
        "fused": done.fused,
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "input_size": list(zoo.input_size(model)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "torchvision")},
    }
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
            _write_weights(model, Path(staging) / WEIGHTS)
            (Path(staging) / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
            for name in (WEIGHTS, CONFIG):
                os.replace(Path(staging) / name, folder / name)
    except OSError as error:
        raise StorageError(f"cannot save to {folder}: {error}") from error
    return folder


def _changed(model: nn.Module, done: Record) -> set[str]:
    """Names of modules that differ from the base's: replaced, rescaled or folded away."""
    changed = {name for entry in done.edits for name in entry.site.names} | set(done.norms)
    for block in (entry.block for entry in done.edits if entry.block is not None):
        changed |= {*block.members, *(() if block.chain else (block.owner,))}
    if done.fused:
        changed |= {entry.site.batchnorm for entry in done.edits if entry.site.batchnorm}
    return changed


def _write_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(model, str(path), metadata={"format": "pt"})


def load(directory: str | os.PathLike[str], *, base: nn.Module | None = None) -> nn.Module:
    """The model a folder holds, in eval mode, on the CPU.

    Args:
        directory: what :func:`save` wrote.
        base: the unconverted model, for models of a class that neither timm nor torchvision builds; a copy is used.

    Raises:
        StorageError: for a folder that is missing, incomplete, corrupt or written by something else; nothing in it is
            executed.
    """
    folder = Path(directory)
    config = _read_config(folder)
    model: nn.Module = _base(folder, config, base)
    try:
        for item in config["plans"]:
            model = apply_(model, Plan.from_dict(item))
    except StorageError as error:
        raise StorageError(f"{folder / CONFIG}: {error}") from error
    except ConvSurgeryError as error:
        raise StorageError(f"{folder / CONFIG} does not fit its base model: {error}") from error
    modules = dict(model.named_modules())
    for name, eps in config["norms"].items():
        if name not in modules:
            raise StorageError(f"{folder / CONFIG}: the base model has no module {name!r}")
        modules[name].eps = float(eps)
    if config["fused"]:
        model = fuse(model)
    done = record(model) or Record(())
    set_record(model, Record(done.plans, dict(config["norms"]), bool(config["fused"])))
    load_weights(model, folder / WEIGHTS)
    frozen = set(config["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
    channels, height, width = config["input_size"]
    zoo.set_input_size(model, (channels, height, width))
    return model.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise StorageError(f"{folder} is not a saved model: {' and '.join(missing)} missing; it holds {found}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise StorageError(f"{folder / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        version = config.get("format") if isinstance(config, dict) else None
        raise StorageError(f"{folder / CONFIG} has format {version!r}; this version of convsurgery reads {FORMAT}")
    for key, kind in _KINDS.items():
        if key not in config:
            raise StorageError(f"{folder / CONFIG} has no {key!r}")
        if not isinstance(config[key], kind):
            raise StorageError(f"{folder / CONFIG}: {key!r} is of the wrong kind, {type(config[key]).__name__}")
    return config


_KINDS: dict[str, type | tuple[type, ...]] = {
    "base": (dict, type(None)),
    "class": str,
    "plans": list,
    "norms": dict,
    "fused": bool,
    "frozen": list,
    "input_size": list,
}


def _base(folder: Path, config: dict[str, Any], base: nn.Module | None) -> nn.Module:
    if base is not None:
        return copy_model(base)
    if config["base"] is None:
        raise StorageError(
            f"{folder} holds a model of class {config['class']}, which neither timm nor torchvision builds by a name "
            "known here; pass the unconverted model: load(directory, base=model)"
        )
    try:
        known = zoo.Base.from_json(config["base"])
        return zoo.create_model(known.name, **dict(known.kwargs))
    except ModelError as error:
        raise StorageError(f"the base model of {folder} cannot be built: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{folder / CONFIG}: 'base' is not what convsurgery writes: {error}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill ``model`` from a safetensors file, dtypes as in the file; all keys must fit.

    Raises:
        StorageError: for a corrupt file or one with other keys or shapes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    own: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    _spread(state, model, own)
    for key, tensor in own.items():
        stored = state.get(key)
        if stored is not None and stored.is_floating_point() and tensor.dtype != stored.dtype:
            tensor.data = tensor.data.to(stored.dtype)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise StorageError(f"{path} does not fit the model: {error}") from error


def _spread(state: dict[str, torch.Tensor], model: nn.Module, own: Mapping[str, torch.Tensor]) -> None:
    """Give every name of a shared module or tensor its value: the file holds each once."""
    for names in aliases(model).values():
        for name in names if len(names) > 1 else ():
            for key in [key for key in state if key.startswith(f"{name}.")]:
                for other in names:
                    state.setdefault(other + key.removeprefix(name), state[key])
    shared: dict[int, list[str]] = {}
    for key, tensor in own.items():
        shared.setdefault(id(tensor), []).append(key)
    for keys in shared.values():
        held = next((state[key] for key in keys if key in state), None)
        if held is not None:
            state.update({key: held for key in keys if key not in state})
