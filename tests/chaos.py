"""Kills, threads, damaged files and odd rules, for as long as one likes.

    python -m tests.chaos --kills 200 --threads 50 --plans 1000 --damage 20000 --rules 80000

Continuous integration runs a minute of it (``test_chaos.py``); ``docs/reliability.md`` has the figures of a long run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import string
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import convsurgery as cs
from convsurgery.errors import ConvSurgeryError

__all__ = ["damage", "kills", "planning", "rules"]

RULE = "first-conv->kerv-poly; last-conv->lbc by fit"


def _model() -> nn.Module:
    torch.manual_seed(0)
    return cs.create_model("test_resnet", num_classes=4, img_size=32)


def _data(count: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 4)


@dataclass(frozen=True)
class Act:
    """Something that writes: what a killed process did, and what the next one does.

    Attributes:
        begin: what may be killed; given the output.
        again: what a user does next: the same with overwrite or resume; given the output.
        result: what is there in the end, to be compared with that of a run nobody killed.
        whole: called on an output that exists after a kill; raises for one that is neither old nor new.
    """

    begin: Callable[[Path], object]
    again: Callable[[Path], object]
    result: Callable[[Path], Any]
    whole: Callable[[Path], object]


def _loaded(folder: Path) -> dict[str, Any]:
    return dict(cs.load(folder).state_dict())


def _saved(folder: Path) -> object:
    """A model that is whole, or no model at all."""
    return cs.load(folder) if (folder / "convsurgery.json").exists() else None


def _converted() -> nn.Module:
    return cs.convert(_model(), RULE, calibration=_data().tensors[0][:8])


def _calibrated(folder: Path) -> object:
    new = cs.convert(_model(), "all-conv->kerv-poly", start="neutral")
    cs.calibrate(new, _data().tensors[0][:16], teacher=_model(), progress=False)
    return cs.save(new, folder)


def _trained(folder: Path, **options: Any) -> object:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 1e-2, "seed": 3, "device": "cpu"}
    return cs.finetune(_converted(), (_data(), _data(16)), output=folder, progress=False, **settings, **options)


def _resumed(folder: Path) -> object:
    return _trained(folder, resume=(folder / "last").exists(), overwrite=not (folder / "last").exists())


def _scanned(folder: Path, **options: Any) -> object:
    return cs.scan(_model(), ["kerv-poly", "lbc"], _data(), images=16, latency=False, output=folder, **options)


def _rescanned(folder: Path) -> object:
    begun = (folder / "rows.jsonl").exists()
    return _scanned(folder, **({"resume": True} if begun else {}))


def _rows(folder: Path) -> list[str]:
    return sorted((folder / "rows.jsonl").read_text().splitlines())


def _exported(path: Path) -> object:
    return cs.export_onnx(_converted(), path, verify=False, overwrite=True)


def _readable(path: Path) -> object:
    import onnx

    return onnx.checker.check_model(str(path))


def _both(folder: Path) -> object:
    """Folders of a run: each that is there is whole."""
    return [_saved(part) for part in (folder / "best", folder / "last") if part.exists()]


def _lines(folder: Path) -> object:
    from convsurgery.adapt.scan import Scan

    return Scan.load(folder) if (folder / "scan.json").exists() else None


ACTS = {
    "convert": Act(lambda out: cs.save(_converted(), out), lambda out: cs.save(_converted(), out), _loaded, _saved),
    "save": Act(lambda out: cs.save(_model(), out), lambda out: cs.save(_model(), out), _loaded, _saved),
    "calibrate": Act(_calibrated, _calibrated, _loaded, _saved),
    "finetune": Act(_trained, _resumed, lambda out: _loaded(out / "last"), _both),
    "scan": Act(_scanned, _rescanned, _rows, _lines),
    "export": Act(_exported, _exported, lambda out: out.read_bytes(), _readable),
}


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    return bool(one == two)


def _in_child(work: Callable[[], object]) -> int:
    """The process id of a child that does ``work`` and is gone."""
    child = os.fork()
    if child:
        return child
    with contextlib.suppress(BaseException):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process ends with it)
        warnings.simplefilter("ignore")
        work()
        os._exit(0)
    os._exit(3)


def kills(rng: random.Random, count: int, place: Path) -> dict[str, Any]:
    """Kill writing processes at random moments; returns how many, and every output that was neither old nor new."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        name = list(ACTS)[number % len(ACTS)]
        act = ACTS[name]
        reference, out = place / f"reference-{name}", place / f"try{number}"
        if not reference.exists():
            act.begin(reference)
            began = time.perf_counter()
            act.begin(place / f"timed-{name}")
            (place / f"{name}.seconds").write_text(str(time.perf_counter() - began))
        seconds = float((place / f"{name}.seconds").read_text())
        there = rng.random() < 0.3 and name in ("convert", "save", "calibrate", "export")
        if there:
            act.begin(out)
        child = _in_child(lambda act=act, out=out: act.begin(out))
        time.sleep(rng.uniform(0, 1.1 * seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        counts["killed" if os.WIFSIGNALED(status) else "done before"] += 1
        try:
            if out.exists():
                act.whole(out)
            elif there:
                raise AssertionError("what was there is gone")
            act.again(out)
            if not _same(act.result(out), act.result(reference)):
                raise AssertionError("in the end it is not what a run without a kill gives")
            left = [path.name for path in place.iterdir() if path.name.startswith(f".try{number}.")]
            counts["leftovers beside"] += len(left)
        except Exception as error:
            wrong.append(f"kill {number}, {name}: {type(error).__name__}: {error!s:.200}")
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True) if out.is_file() else None
    return {"kills": count, **counts, "wrong": wrong}


PIECES = (
    *("first-conv", "all-conv", "conv", "last-conv", "depthwise", "conv-bn", "keep", "auto", "kerv-poly", "pnn", "lbc"),
    *("->", "[", "]", "(", ")", ",", ";", "=", "!=", ">=", "<", "k", "s", "name", "in", "index", "degree", "fanout"),
    *(
        "3",
        "0",
        "-1",
        "1e3",
        "3x5",
        "0..4",
        "true",
        "none",
        "/a+/",
        "layer*",
        "by",
        "neutral(1e-3)",
        "fit",
        "|",
        " ",
        "%",
    ),
)


def rules(rng: random.Random, count: int) -> dict[str, Any]:
    """Parse odd texts; each is refused by an error of ours, or read back the same from what it prints."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    good = ["first-conv->kerv-poly(degree=3) by neutral(1e-3)", "conv[k=3, name=layer*]->lbc; all-conv->keep"]
    for _ in range(count):
        if rng.random() < 0.5:
            text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 14)))
        else:
            signs = list(rng.choice(good))
            for _ in range(rng.randrange(1, 4)):
                signs[rng.randrange(len(signs))] = rng.choice((*string.printable, "", "→", "\0", "((", "]]"))
            text = "".join(signs)
        try:
            read = cs.parse(text)
        except ConvSurgeryError:
            counts["refused"] += 1
            continue
        except Exception as error:
            wrong.append(f"{text!r}: {type(error).__name__}: {error!s:.100}")
            continue
        counts["read"] += 1
        if cs.parse(str(read)) != read:
            wrong.append(f"{text!r} reads otherwise from {str(read)!r}")
    return {"rules": count, **counts, "wrong": wrong}


def planning(threads: int, plans: int) -> dict[str, Any]:
    """Plan in threads while another model serves; returns what failed and how often it answered."""
    import timm

    served, x = timm.create_model("test_byobnet").eval(), torch.randn(1, 3, 64, 64)
    models = [timm.create_model(name).eval() for name in ("test_resnet", "test_efficientnet", "test_vit")]
    wanted = [cs.plan(model, "all-conv->kerv-poly by copy") for model in models]
    with torch.no_grad():
        answer = served(x)
    wrong: list[str] = []
    stop, answers = threading.Event(), [0]
    before = nn.Module.__call__, nn.Module.__getattr__

    def serve() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(served(x), answer):
                    wrong.append("the served model answered otherwise")
                answers[0] += 1

    def plan(number: int) -> None:
        try:
            for turn in range(plans // threads):
                which = (number + turn) % len(models)
                if cs.plan(models[which], "all-conv->kerv-poly by copy") != wanted[which]:
                    wrong.append(f"thread {number}: another plan")
        except Exception as error:
            wrong.append(f"thread {number}: {type(error).__name__}: {error!s:.100}")

    server = threading.Thread(target=serve)
    server.start()
    working = [threading.Thread(target=plan, args=(number,)) for number in range(threads)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    stop.set()
    server.join()
    if (nn.Module.__call__, nn.Module.__getattr__) != before:
        wrong.append("something is left behind on nn.Module")
    return {"threads": threads, "plans": plans // threads * threads, "answers": answers[0], "wrong": wrong}


def damage(rng: random.Random, tries: int, place: Path) -> dict[str, Any]:
    """Damaged folders, plans, recipes, scans and checkpoints, read under a guard; see ``tests/damage.py``."""
    import damage as damaged
    from test_guard import make_good

    good, tried = place / "good", place / "tried"
    for folder in (good, tried):
        folder.mkdir()
    make_good(good)
    return damaged.run(good, tried, rng, tries)


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 200), ("threads", 50), ("plans", 1000), ("damage", 20_000), ("rules", 80_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng, failed = random.Random(asked.seed), False
    with tempfile.TemporaryDirectory() as folder:
        for work in (
            lambda: kills(rng, asked.kills, Path(folder)),
            lambda: rules(rng, asked.rules),
            lambda: planning(asked.threads, asked.plans) if asked.plans else {"wrong": []},
            lambda: damage(rng, asked.damage, Path(folder)) if asked.damage else {"wrong": []},
        ):
            began = time.perf_counter()
            counts = work()
            failed |= bool(counts["wrong"])
            print(
                ", ".join(f"{key}: {value}" for key, value in counts.items()), f"({time.perf_counter() - began:.0f} s)"
            )
            sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
