"""What a sweep says about one architecture: one line of JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from convsurgery.errors import StorageError
from convsurgery.files import read_text
from convsurgery.plain import parse_json

__all__ = ["CHECKS", "Row", "append_row", "read_rows", "versions"]

#: what a sweep can check, each resting on the ones before
CHECKS = ("plan", "null", "poly")


@cache
def versions() -> dict[str, str]:
    """Of everything a row depends on."""
    return {name: importlib.metadata.version(name) for name in ("convsurgery", "torch", "timm", "torchvision")}


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name, family: as ``zoo.create_model`` takes it; the module that defines it.
        checks: what was asked for, of :data:`CHECKS`.
        convolutions: Conv2d modules; ``visible`` are called by a forward, ``uncalled`` by none.
        planned: replaced under ``all-conv->conv``; ``skipped`` gives the reasons for the others, with counts.
        executed: convolutions that a forward executes, of every kind, counted where torch dispatches them.
        explained: whether that is what the plan says: calls of the Conv2d it lists, and ``others`` by kind and owner.
            None where it could not be counted.
        seen: how it was seen.
        plan_seconds, trace_seconds: planning, and timm's own FX trace of the same model; medians of three.
        unfit: why the model was not built with weights, or None.
        input: shapes of the smallest input that was found legal.
        listed: the plan's called convolutions are, in order and number of calls, those that hooks saw in a forward.
        finite: the outputs hold no NaN and no infinity.
        null_equal: outputs bit-equal under the null rule in eval mode.
        state_equal: keys, their order and values of ``state_dict`` the same.
        train_equal: flags the same after ``train()`` and ``eval()``, and outputs and BatchNorm statistics of a seeded
            forward in train mode bit-equal; only the flags where ``train_forward`` says why there was none.
        converted: replaced under ``all-conv->kerv-poly``, ``kept`` the reasons for the others.
        poly_finite: whether the outputs then hold no NaN and no infinity.
        relative_error: of the outputs then, to their largest value; not for detectors. ``top1_kept`` for classifiers.
        sensitivity: for comparison, the same error of the unconverted model when every input value is off by 1e-4 of
            itself; of models with BatchNorm.
        seconds: for everything.
        error: stage, type and first line of what went wrong; None when nothing did.
    """

    name: str
    family: str
    checks: tuple[str, ...]
    versions: Mapping[str, str]
    params: int = 0
    convolutions: int = 0
    visible: int = 0
    uncalled: int = 0
    planned: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    executed: int | None = None
    others: Mapping[str, int] = field(default_factory=dict)
    explained: bool | None = None
    seen: str = ""
    plan_seconds: float | None = None
    trace_seconds: float | None = None
    unfit: str | None = None
    input: tuple[tuple[int, ...], ...] = ()
    listed: bool | None = None
    finite: bool | None = None
    null_equal: bool | None = None
    state_equal: bool | None = None
    train_equal: bool | None = None
    train_forward: str | None = None
    converted: int | None = None
    kept: Mapping[str, int] = field(default_factory=dict)
    poly_finite: bool | None = None
    relative_error: float | None = None
    top1_kept: bool | None = None
    sensitivity: float | None = None
    seconds: float = 0.0
    error: Mapping[str, str] | None = None

    @property
    def exceptions(self) -> list[str]:
        """Everything about it that is not as it should be, in words; empty for a row that needs no explanation."""
        found = [f"{self.error['stage']}: {self.error['type']}: {self.error['text']}"] if self.error else []
        if self.error is None and self.visible != self.planned + sum(self.skipped.values()):
            found.append(f"{self.visible} convolutions called, {self.planned} planned")
        for name, text in _PROMISES.items():
            if getattr(self, name) is False:
                found.append(text)
        return found

    def to_json(self) -> str:
        """The row as one line."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row of a line; ValueError, KeyError or TypeError for anything else."""
        data: dict[str, Any] = parse_json(line, "the row")
        data["checks"] = tuple(data["checks"])
        data["input"] = tuple(tuple(shape) for shape in data["input"])
        return cls(**data)


_PROMISES = {
    "explained": "a convolution is executed that the plan neither lists nor explains",
    "listed": "a convolution is called that the plan does not list so",
    "finite": "the model itself gives values that are not finite",
    "null_equal": "the output changes under the null rule",
    "state_equal": "the state changes under the null rule",
    "train_equal": "train mode changes under the null rule",
}


def append_row(path: Path, row: Row) -> None:
    """Add a line at once and whole."""
    with path.open("a", encoding="utf-8") as file:
        file.write(row.to_json() + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, the last of each name; a last line that was cut off is dropped.

    Raises:
        StorageError: when another line is no row.
    """
    rows: dict[str, Row] = {}
    lines = read_text(path).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = Row.from_json(line)
        except (ValueError, KeyError, TypeError, AttributeError, StorageError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise StorageError(f"{path}, line {number}, is not a row of a coverage sweep: {error}") from error
        rows.pop(row.name, None)
        rows[row.name] = row
    return list(rows.values())
