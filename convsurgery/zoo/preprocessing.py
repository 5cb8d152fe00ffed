"""How a model wants its images, in plain data: what a saved model keeps of timm's ``pretrained_cfg``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from convsurgery.errors import StorageError
from convsurgery.plain import declared, from_plain

__all__ = ["preprocessing", "set_preprocessing"]

_SIDE, _CHANNELS, _NAMES = 1 << 16, 4096, 64


@dataclass(frozen=True)
class _Preprocessing:
    """The entries of a ``pretrained_cfg`` that say how to use a model; none says where weights come from."""

    input_size: tuple[int, ...] | None = None
    test_input_size: tuple[int, ...] | None = None
    min_input_size: tuple[int, ...] | None = None
    fixed_input_size: bool | None = None
    pool_size: tuple[int, ...] | None = None
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    test_crop_pct: float | None = None
    crop_mode: str | None = None
    first_conv: tuple[str, ...] | None = None
    classifier: tuple[str, ...] | None = None


_FIELDS = tuple(field.name for field in dataclasses.fields(_Preprocessing))
_ONE_OR_MORE = ("first_conv", "classifier")


def preprocessing(model: nn.Module) -> dict[str, Any] | None:
    """The entries as JSON takes them; None for a model without a ``pretrained_cfg``, or with one of another form."""
    cfg = declared(model)
    if not cfg:
        return None
    found = {}
    for name in _FIELDS:
        value = cfg.get(name)
        if value is not None:
            found[name] = list(value) if isinstance(value, tuple) else value
    try:
        _read(found, "pretrained_cfg")
    except StorageError:
        return None
    return found


def set_preprocessing(model: nn.Module, data: Any, where: str) -> None:
    """Put back what :func:`preprocessing` gave; nothing is done to a model without a ``pretrained_cfg``.

    Raises:
        StorageError: for an entry that is none of these, of another kind, or out of range; begins with ``where``.
    """
    values = _read(data, where)
    cfg = declared(model)
    if not cfg:
        return
    changed = {name: value for name, value in values.items() if _plain(cfg.get(name)) != _plain(value)}
    if changed:
        model.pretrained_cfg = {**cfg, **changed}  # type: ignore[assignment]
        if isinstance(getattr(model, "default_cfg", None), dict):
            model.default_cfg = model.pretrained_cfg  # timm's older name of the same


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _read(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise StorageError(f"{where} must be a mapping, not {data!r:.80}")
    single = {name: (data[name],) for name in _ONE_OR_MORE if isinstance(data.get(name), str)}
    read = from_plain(_Preprocessing, {**data, **single}, where)
    for name in ("input_size", "test_input_size", "min_input_size", "pool_size"):
        sizes = getattr(read, name)
        if sizes is not None and not (len(sizes) in (1, 2, 3) and all(1 <= size <= _SIDE for size in sizes)):
            raise StorageError(f"{where}.{name} is out of range: {sizes!r:.80}")
    for name in ("mean", "std"):
        numbers = getattr(read, name)
        low = 0.0 if name == "mean" else 1e-6
        if numbers is not None and not (
            1 <= len(numbers) <= _CHANNELS and all(low <= abs(number) <= 1e6 for number in numbers)
        ):
            raise StorageError(f"{where}.{name} is out of range: {numbers!r:.80}")
    for name in ("crop_pct", "test_crop_pct"):
        share = getattr(read, name)
        if share is not None and not 0 < share <= 16:
            raise StorageError(f"{where}.{name} is out of range: {share!r}")
    if read.num_classes is not None and not 0 <= read.num_classes <= 1 << 24:
        raise StorageError(f"{where}.num_classes is out of range: {read.num_classes!r}")
    for name in ("interpolation", "crop_mode"):
        word = getattr(read, name)
        if word is not None and not (word.isidentifier() and len(word) <= _NAMES):
            raise StorageError(f"{where}.{name} is no word: {word!r:.80}")
    values = {name: getattr(read, name) for name in _FIELDS if getattr(read, name) is not None}
    return {**values, **{name: names[0] for name, names in single.items()}}
