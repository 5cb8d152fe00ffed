"""The folder of a run: ``metrics.csv``, ``best/`` and ``last/``, and going on from there."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convsurgery.errors import StorageError
from convsurgery.files import RUNNING, member, output_folder, read_text, replace_folder, staging, writing
from convsurgery.surgery import blend_modules, finish_blend, load_weights
from convsurgery.surgery.storage import CONFIG, read_weights_of

__all__ = ["RunFolder", "Saver"]

Saver = Callable[[nn.Module, Path], object]

_METRICS, _STATE, _WEIGHTS = "metrics.csv", "training_state.pt", "model.safetensors"
_FORMAT = 1
#: only the old one is there where two folders cannot change places at once and the run was killed in between
_LAST = ("last", ".last.old")


class RunFolder:
    """Everything a run writes. Only the main process may call the methods that write.

    ``best/`` and ``last/`` are replaced as a whole: the new one is written beside the old one and then takes its name,
    so that a run that is killed while it writes leaves one that can be loaded. The training state lies inside
    ``last/``, so that it never belongs to other weights.

    Args:
        path: the folder; made when the run begins.
        saver: writes a model into a folder that does not exist yet.
        columns: of ``metrics.csv``.
    """

    def __init__(self, path: str | os.PathLike[str], saver: Saver, columns: Sequence[str]) -> None:
        self.path, self.saver, self.columns = Path(path).expanduser(), saver, tuple(columns)

    @property
    def files(self) -> tuple[Path, ...]:
        """What there is, for telling the user."""
        return tuple(part for name in (_METRICS, "best", "last") if (part := self.path / name).exists())

    @property
    def begun(self) -> bool:
        """Whether a run lies here that was cut off before it had anything to go on from."""
        if any((self.path / name / _STATE).is_file() for name in _LAST):
            return False
        metrics = self.path / _METRICS
        rows = len(read_text(metrics).splitlines()) - 1 if metrics.is_file() else 0
        # Rows come after checkpoints: with rows there was one, and it was taken away.
        return rows < 1 and (metrics.is_file() or (self.path / RUNNING).exists())

    def refuse_if_used(self) -> None:
        """Raise when another run lies here."""
        if self.files:
            raise StorageError(
                f"{self.path} already holds a run ({', '.join(part.name for part in self.files)}); continue it with "
                f"resume=True (--resume), replace it with overwrite=True (--overwrite), or choose another folder"
            )

    def begin(self, rows: Sequence[Mapping[str, Any]], fresh: bool) -> None:
        """Make the folder and write ``metrics.csv`` with the rows known so far."""
        try:
            output_folder(self.path)
            if fresh:
                for name in ("best", "last"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
            # A run killed between checkpoint and row leaves a row too few; the checkpoint's history knows them all.
            with (
                writing(self.path / _METRICS, named=False) as beside,
                beside.open("w", newline="", encoding="utf-8") as file,
            ):
                writer = csv.writer(file)
                writer.writerow(self.columns)
                writer.writerows(self._cells(row) for row in rows)
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error}") from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row to ``metrics.csv``."""
        with (self.path / _METRICS).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(self._cells(row))

    def _cells(self, row: Mapping[str, Any]) -> list[str]:
        values = (row[name] for name in self.columns)
        return ["" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value) for value in values]

    def write_best(self, model: nn.Module) -> None:
        self._write("best", model, None)

    def write_last(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        self._write("last", model, {"format": _FORMAT, **state})

    def _write(self, name: str, model: nn.Module, state: Mapping[str, Any] | None) -> None:
        target = self.path / name
        try:
            with staging(self.path, name) as temporary:
                beside = temporary / name
                self.saver(model, beside)
                if state is not None:
                    torch.save(dict(state), beside / _STATE)
                replace_folder(beside, target)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            raise StorageError(f"cannot write {target}: {error}") from error

    def read(self, model: nn.Module) -> dict[str, Any]:
        """Put the weights of ``last/`` into ``model`` and give back the training state.

        Raises:
            StorageError: nothing there, not written by fine-tuning, or weights of another model. Nothing is executed:
                the state is read with ``weights_only=True``.
        """
        tried = [self.path / name for name in _LAST]
        last = next((part for part in tried if (part / _STATE).is_file()), None)
        if last is None:
            raise StorageError(f"nothing to resume in {self.path}: there is no last/{_STATE}")
        try:
            state = torch.load(member(last, _STATE), map_location="cpu", weights_only=True)
        except StorageError:
            raise
        except Exception as error:  # the unpickler of a damaged file raises almost anything
            raise StorageError(f"{last / _STATE} is not a training state: {error}") from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise StorageError(f"{last / _STATE} is not a training state of this version (format {_FORMAT})")
        _finish_what_arrived(model, state)
        try:
            if (last / CONFIG).is_file():
                load_weights(model, *read_weights_of(last))
            else:  # a saver of the caller's own
                load_weights(model, member(last, _WEIGHTS))
        except StorageError as error:
            text = " ".join(str(error).split())
            raise StorageError(f"the weights in {last} are not this model's: {text}") from error
        return state


def _finish_what_arrived(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Blends that had arrived when the folder was written have left their convolutions behind."""
    for module in blend_modules(model).values():
        if "left" in state and module.site not in state["left"]:
            module.set_t(1.0)
    finish_blend(model)
