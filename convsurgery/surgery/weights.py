"""The weights of a saved model: written whole, known again by their digest, and read into a model of the same form."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.errors import StorageError
from convsurgery.graph import aliases

__all__ = ["describe", "digest", "header", "load_weights"]


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def describe(model: nn.Module, path: Path) -> dict[str, Any]:
    """What ``convsurgery.json`` says of the weights in ``path``: digest, dtypes, and which tensors hold infinity.

    Raises:
        StorageError: where a tensor holds NaN: ``load`` would refuse it.
    """
    infinite = []
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not _finite(tensor):
            if bool(_wide(tensor).isnan().any()):
                raise StorageError(f"{name} holds NaN: such a model predicts nothing, and is not saved")
            infinite.append(name)
    kinds = Counter(dtype for _, dtype in header(path).values())
    return {"sha256": digest(path), "dtypes": dict(sorted(kinds.items())), "infinite": infinite}


def header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a safetensors file; no tensor is read.

    Raises:
        StorageError: for a file that is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(item.get_shape()), str(item.get_dtype())) for name, item in slices.items()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def load_weights(model: nn.Module, path: Path, described: Mapping[str, Any] | None = None) -> None:
    """Fill ``model`` from a safetensors file, dtypes as in the file; all keys must fit.

    Args:
        model: of the form that was saved.
        path: of the file.
        described: what :func:`describe` gave when it was written; without it only finiteness and the kinds of the
            tensors are checked.

    Raises:
        StorageError: for a corrupt file, one with other keys, shapes, kinds or dtypes, values that are not finite, and
            variances below 0.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    described = described or {}
    try:
        state = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    _check_values(state, own, path, set(described.get("infinite", ())))
    _spread(state, model, own)
    for key, tensor in own.items():
        stored = state.get(key)
        if not isinstance(tensor, Tensor) or stored is None or not stored.is_floating_point():
            continue
        if tensor.dtype != stored.dtype:
            tensor.data = tensor.data.to(stored.dtype)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise StorageError(f"{path} does not fit the model: {error}") from error
    if "dtypes" in described:
        kinds = Counter(dtype for _, dtype in header(path).values())
        if kinds != Counter(described["dtypes"]):
            raise StorageError(f"{path} holds other dtypes than were saved: {dict(kinds)}, not {described['dtypes']}")


def _check_values(state: Mapping[str, Tensor], own: Mapping[str, Any], path: Path, infinite: set[str]) -> None:
    for key, value in state.items():
        if not _finite(value) and (key not in infinite or bool(_wide(value).isnan().any())):
            raise StorageError(f"{path}: {key} holds values that are not finite (NaN or infinity)")
        if key.rpartition(".")[2] == "running_var" and bool((_wide(value) < 0).any()):
            raise StorageError(f"{path}: {key} holds variances below 0")
        mine = own.get(key)
        # Half and single precision may stand for one another, a mask of integers for weights may not.
        if isinstance(mine, Tensor) and mine.dtype != value.dtype and _sort(mine) != _sort(value):
            raise StorageError(f"{path} does not fit the model: {key} is {value.dtype}, the model's is {mine.dtype}")


def _sort(value: Tensor) -> Any:
    return "float" if value.is_floating_point() else "complex" if value.is_complex() else value.dtype


def _wide(value: Tensor) -> Tensor:
    # The 8-bit floats have few functions of their own.
    return value.float() if value.is_floating_point() and value.element_size() == 1 else value


def _finite(value: Tensor) -> bool:
    if value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return True
    return bool(torch.isfinite(_wide(value)).all())


def _spread(state: dict[str, Tensor], model: nn.Module, own: Mapping[str, Tensor]) -> None:
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
