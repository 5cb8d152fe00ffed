"""Many architectures in several processes: a worker that dies or hangs costs one row, and a sweep can be resumed."""

from __future__ import annotations

import fnmatch
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from convsurgery import zoo
from convsurgery.coverage.row import CHECKS, Row, append_row, read_rows, versions
from convsurgery.errors import ArgumentError, ModelError, nearest
from convsurgery.files import output_file, output_folder, writing

__all__ = ["choose", "sweep"]

#: architectures a worker checks before it is replaced: what models leave behind does not pile up
_TASKS = 40


def choose(patterns: Sequence[str]) -> list[str]:
    """Names of timm and torchvision that match any of the shell patterns, all of them without one.

    Raises:
        ModelError: for a pattern that matches nothing, with the nearest names.
    """
    names = zoo.list_models()
    if not patterns:
        return names
    chosen: dict[str, None] = {}
    for pattern in patterns:
        plain = pattern.removeprefix("timm/")
        found = [name for name in names if fnmatch.fnmatchcase(name, plain)]
        if not found:
            raise ModelError(f"no architecture matches {pattern!r}; {nearest(plain, names)}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def sweep(
    names: Sequence[str],
    output: Path,
    *,
    checks: Sequence[str] = CHECKS,
    processes: int = 2,
    timeout: float = 900,
    max_params: float = 3e9,
    restart: bool = False,
    report: Callable[[Row, int, int], None] | None = None,
) -> list[Row]:
    """Check architectures and write a line of JSON for each as soon as it is done.

    Args:
        names: architectures.
        output: the file; rows in it that are of the same checks and versions are kept and not done again.
        checks: of :data:`CHECKS`; "plan" is always done.
        processes: how many work at a time, on one thread each.
        timeout: seconds for one architecture.
        max_params: larger models are only planned.
        restart: begin anew.
        report: called with every new row, how many are done, and how many there are.

    Returns:
        The rows of ``names``, old and new.

    Raises:
        ArgumentError: for a check that does not exist.
        StorageError: when the file holds something else.
    """
    for check in checks:
        if check not in CHECKS:
            raise ArgumentError("checks", f"there is no check {check!r}", nearest(check, CHECKS))
    wanted = tuple(check for check in CHECKS if check in checks or check == CHECKS[0])
    output_folder(output.parent)
    output = output_file(output)
    if restart:
        output.unlink(missing_ok=True)
    known = {row.name: row for row in read_rows(output)} if output.exists() else {}
    _drop_cut_line(output)
    done = {name: row for name, row in known.items() if row.checks == wanted and row.versions == versions()}
    left = [name for name in names if name not in done]
    finished = len(names) - len(left)
    for row in _work(left, wanted, processes, timeout, max_params):
        append_row(output, row)
        done[row.name] = row
        finished += 1
        if report is not None:
            report(row, finished, len(names))
    return [done[name] for name in names]


def _drop_cut_line(output: Path) -> None:
    """An interrupted write leaves half a line, behind which nothing could be added."""
    if not output.exists():
        return
    data = output.read_bytes()
    if data and not data.endswith(b"\n"):
        with writing(output) as staged:
            staged.write_bytes(data[: data.rfind(b"\n") + 1])


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    name: str | None = None
    deadline: float = 0.0
    tasks: int = field(default=0)

    def give(self, name: str, timeout: float) -> None:
        self.name, self.deadline, self.tasks = name, time.monotonic() + timeout, self.tasks + 1
        self.pipe.send(name)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(
    names: Sequence[str], checks: tuple[str, ...], processes: int, timeout: float, max_params: float
) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    alone = context.Lock()

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, checks, max_params, alone), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    queue = list(reversed(names))
    workers: list[_Worker] = []
    try:
        while queue or any(worker.name for worker in workers):
            while queue and len(workers) < processes:
                workers.append(start())
            for worker in workers:
                if worker.name is None and queue:
                    worker.give(queue.pop(), timeout)
            busy = [worker for worker in workers if worker.name is not None]
            first = min(worker.deadline for worker in busy)
            wait([worker.pipe for worker in busy], max(0.0, first - time.monotonic()))
            for worker in busy:
                row = _outcome(worker, checks, timeout)
                if row is not None:
                    worker.name = None
                    yield row
                if row is not None and (row.error or worker.tasks >= _TASKS or not worker.process.is_alive()):
                    worker.stop()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.stop()


def _outcome(worker: _Worker, checks: tuple[str, ...], timeout: float) -> Row | None:
    """The row a worker has sent, or the one that says how it ended; None while it works."""
    name = str(worker.name)
    if worker.pipe.poll():
        try:
            return Row.from_json(worker.pipe.recv())
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return _failed(name, checks, "WorkerDied", f"the process ended by {how}, perhaps for want of memory")
    if time.monotonic() >= worker.deadline:
        worker.process.kill()
        return _failed(name, checks, "Timeout", f"not done after {timeout:g} s")
    return None


def _failed(name: str, checks: tuple[str, ...], kind: str, text: str) -> Row:
    from convsurgery.coverage.subject import family_of

    return Row(name, family_of(name), checks, versions(), error={"stage": "worker", "type": kind, "text": text})


def _serve(pipe: Connection, checks: tuple[str, ...], max_params: float, alone: Any) -> None:
    """A worker: names come in, rows go out."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    import warnings

    import torch

    from convsurgery.coverage.measure import measure

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the models' making
    while True:
        try:
            pipe.send(measure(pipe.recv(), checks, max_params, alone).to_json())
        except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the sweep is over
            return
