"""What a run tells while it runs: a bar on a terminal, plain lines elsewhere, nothing when asked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["LayerProgress", "Lines", "Progress", "RichProgress", "make_progress"]


class Progress:
    """Says nothing; the others are made from it."""

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None) -> None:
        """Epoch ``epoch`` of ``epochs`` begins; it has ``steps`` batches, if that is known."""

    def step(self, step: int, loss: float, lr: float) -> None:
        """Batch ``step`` of the epoch is done."""

    def note(self, text: str) -> None:
        """One line worth keeping."""

    def close(self) -> None:
        """Nothing more will come."""


class Lines(Progress):
    """Plain lines, for files, pipes and notebooks.

    Args:
        stream: where to.
        interval: steps between two lines; 0 for none inside an epoch.
    """

    def __init__(self, stream: TextIO, interval: int) -> None:
        self.stream, self.interval, self.prefix, self.steps = stream, interval, "", ""

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None) -> None:
        self.prefix, self.steps = f"epoch {epoch}/{epochs}", "" if steps is None else f"/{steps}"

    def step(self, step: int, loss: float, lr: float) -> None:
        if self.interval and step % self.interval == 0:
            self.note(f"{self.prefix}  step {step}{self.steps}  loss {loss:.4f}  lr {lr:.2e}")

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class RichProgress(Progress):
    """A bar per epoch under the lines of the epochs before."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self.bar: Bar = Bar(*columns, console=Console(file=stream), transient=True)
        self.task: TaskID | None = None
        self.bar.start()

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(f"epoch {epoch}/{epochs}", total=steps, numbers="")

    def step(self, step: int, loss: float, lr: float) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=step, numbers=f"loss {loss:.4f}  lr {lr:.2e}")

    def note(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.bar.stop()


def make_progress(show: bool, interval: int, stream: Any = None) -> Progress:
    """The progress that suits ``stream`` (standard error when absent, as results go to standard output)."""
    stream = sys.stderr if stream is None else stream
    if not show:
        return Progress()
    return RichProgress(stream) if stream.isatty() else Lines(stream, interval)


class LayerProgress:
    """A bar over layers on a terminal; silent elsewhere, where a table follows.

    Args:
        what: is being done, such as "calibrating".
        total: number of layers; None where it is not known before.
        show: False for silence on terminals too.
    """

    def __init__(self, what: str, total: int | None, *, show: bool) -> None:
        self.bar: Bar | None = None
        if not (show and sys.stderr.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[layer]}"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task(what, total=total, layer="")
        self.bar.start()

    def done(self, layer: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, advance=1, layer=layer)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
