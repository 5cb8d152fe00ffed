"""The whole way on real data that needs no network: scikit-learn's scanned digits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import convsurgery as cs
from convsurgery.adapt.data import load_data
from convsurgery.adapt.evaluation import EvalResult
from convsurgery.adapt.processes import alone_among_processes
from convsurgery.adapt.results import FinetuneResult
from convsurgery.bench.measure import medians
from convsurgery.errors import StorageError
from convsurgery.surgery.table import count

__all__ = ["run_demo"]

_MODEL = "resnet10t"
_RULES = ("first-conv->kerv-poly", "all-conv->kerv-poly")
_SIZE = 32


@dataclass(frozen=True)
class _Row:
    """One converted model: as it was right after conversion, and after its short fine-tuning."""

    rule: str
    model: nn.Module
    at_first: EvalResult
    after: FinetuneResult
    folder: Path


def run_demo(output: Path, seed: int = 0, *, overwrite: bool = False) -> None:
    """Train, convert, fine-tune, export, verify and time; print one table and what was written.

    Raises:
        StorageError: where the folder holds something and ``overwrite`` is not set.
    """
    alone_among_processes("demo")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise StorageError(
            f"{output} holds something already: --overwrite replaces an earlier demo, or name another folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=False)
    began = time.perf_counter()

    console.print(f"1. Train timm's {_MODEL} on scikit-learn's digits ({_SIZE}x{_SIZE}, one channel).")
    torch.manual_seed(seed)
    model = cs.create_model(_MODEL, num_classes=10, in_chans=1, img_size=_SIZE)
    data = load_data("digits", model=model, batch_size=64)
    assert data.val is not None
    cs.finetune(model, data, epochs=6, lr=3e-3, warmup_epochs=1, seed=seed, log_interval=0)
    before = cs.evaluate(model, data.val)
    written = [cs.save(model, output / "original")]

    rows = []
    for number, rule in enumerate(_RULES, start=2):
        console.print(f"\n{number}. {rule}")
        console.print(str(cs.plan(model, rule)))
        new = cs.convert(model, rule)
        at_first = cs.evaluate(new, data.val, teacher=model)
        folder = output / rule.split("-")[0]
        after = cs.finetune(
            new, data, teacher=model, epochs=2, lr=3e-4, output=folder, overwrite=True, seed=seed, log_interval=0
        )
        rows.append(_Row(rule, new, at_first, after, folder))
        written.append(folder)

    console.print(f"\n{len(_RULES) + 2}. Export; each file is verified in ONNX Runtime before it appears.")
    exported = [(model, output / "original.onnx")]
    exported += [(row.model, row.folder.with_suffix(".onnx")) for row in rows]
    for source, path in exported:
        console.print(f"{path.name}: {cs.export_onnx(source, path)}")
        written.append(path)
    times = _time([path for _, path in exported])

    console.print()
    console.print(_table(before, rows, times))
    console.print(
        f"\nAccuracy in percent of {before.samples} held-out digits. Milliseconds for a batch of 8\n"
        f"in ONNX Runtime on one CPU thread, medians. All of it took {time.perf_counter() - began:.0f} s and wrote:"
    )
    for path in written:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                console.print(f"  {file}  {count(file.stat().st_size)}B")


def _time(paths: list[Path]) -> list[float]:
    """Milliseconds for a batch of 8 on one thread, each file in turn in every round."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # One thread each: the idle threads of one session would spin in the way of the others.
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(str(p), options, providers=["CPUExecutionProvider"]) for p in paths]
    images = np.random.default_rng(0).random((8, 1, _SIZE, _SIZE), dtype=np.float32)
    calls = {str(p): partial(s.run, None, {"input": images}) for p, s in zip(paths, sessions, strict=True)}
    return [seconds * 1e3 for seconds in medians(calls, 60).values()]


def _table(before: EvalResult, rows: list[_Row], times: list[float]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    columns = ("", "before", "right after\nconversion", "answers\nkept", "after\nfine-tuning", "ONNX\nms")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    table.add_row("original", f"{before.top1:.2f}", "", "", "", f"{times[0]:.2f}")
    for row, taken in zip(rows, times[1:], strict=True):
        kept = f"{row.at_first.kept} of {row.at_first.samples}"
        after = f"{row.after.last.val_top1:.2f}"
        table.add_row(row.rule, f"{before.top1:.2f}", f"{row.at_first.top1:.2f}", kept, after, f"{taken:.2f}")
    return table
