"""Random damage to everything we read: each try is refused with an error of ours, or gives exactly what was saved."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from guard import Guard, Violation
from hostile import seal
from torch import nn

import convsurgery as cs
from convsurgery.adapt.scan import Scan
from convsurgery.errors import ConvSurgeryError
from convsurgery.recipes import read_recipe
from convsurgery.surgery.storage import CONFIG, WEIGHTS

__all__ = ["KINDS", "run"]

#: what a damaged value may become
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 1e300, -1e-300, 10**18, 0.5, "", "x", "../x", "/etc/passwd", "hf-hub:a/b"),
    *(
        "\x00",
        "a" * 5000,
        [],
        [[]],
        [1, 2],
        {},
        {"pretrained": True},
        {"url": "http://127.0.0.1:9/"},
        [None],
        ["conv1"],
    ),
)
RECIPE = """model: {name: test_resnet, num_classes: 10, img_size: 32, kwargs: {in_chans: 1, layers: [1, 1, 1, 1]}}
data: {dataset: digits}
convert: {rule: "first-conv->kerv-poly", start: neutral(1e-3)}
calibrate: {images: 8}
finetune: {teacher: original, epochs: 1, lr: 1e-3, decay_milestones: [1, 2]}
export: {file: model.onnx, tolerance: 1e-4}
output: out
seed: 0
"""


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """A few bytes turned, taken out, put in, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        # Heads are short and matter most.
        place = rng.randrange(min(len(changed), rng.choice((16, 512, 1 << 30))) or 1)
        what = rng.randrange(5)
        if what == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            del changed[place : place + rng.choice((1, 8, 100))]
        elif what == 2:
            changed[place:place] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8))))
        elif what == 3:
            del changed[place:]
        else:
            changed[place : place + 8] = changed[-8:]
    return bytes(changed)


def value_changed(data: Any, rng: random.Random) -> Any:
    """One value somewhere in plain data replaced, removed, or doubled."""
    if isinstance(data, dict) and data and rng.random() < 0.9:
        key = rng.choice(list(data))
        if rng.random() < 0.15:
            return {name: value for name, value in data.items() if name != key}
        if rng.random() < 0.1:
            return {**data, rng.choice(("exec", "pretrained_cfg", "names", "")): rng.choice(VALUES)}
        return {**data, key: value_changed(data[key], rng)}
    if isinstance(data, list) and data and rng.random() < 0.9:
        place = rng.randrange(len(data))
        if rng.random() < 0.15:
            return data[:place] + data[place + 1 :]
        if rng.random() < 0.1:
            return [*data, data[place]]
        return [*data[:place], value_changed(data[place], rng), *data[place + 1 :]]
    if type(data) in (int, float) and rng.random() < 0.3:
        return data + rng.choice((1, -1, 0.5, 1e-9)) if rng.random() < 0.5 else data * rng.choice((2, -1, 1e9))
    return rng.choice(VALUES)


def _same(one: nn.Module, two: nn.Module) -> bool:
    left, right = one.state_dict(), two.state_dict()
    equal = left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())
    x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    return equal and torch.equal(one(x), two(x)) and cs.record(one) == cs.record(two)


def _folder(good: Path, place: Path, rng: random.Random, name: str, sealed: bool) -> Callable[[], Any]:
    shutil.copytree(good / "folder", place)
    path = place / name
    if name == CONFIG and rng.random() < 0.8:
        path.write_text(json.dumps(value_changed(json.loads(path.read_text()), rng)))
        if sealed:
            with contextlib.suppress(AttributeError, TypeError, KeyError):  # nothing may be left to be sealed
                seal(place)
    else:
        path.write_bytes(bytes_changed(path.read_bytes(), rng))
    return lambda: cs.load(place)


def _plan(good: Path, place: Path, rng: random.Random) -> Callable[[], Any]:
    plan = json.loads((good / "folder" / CONFIG).read_text())["plans"][0]
    text = json.dumps(value_changed(plan, rng)) if rng.random() < 0.8 else json.dumps(plan)
    text = text if rng.random() < 0.8 else bytes_changed(text.encode(), rng).decode("utf-8", "replace")
    model = cs.load(good / "base")

    def read() -> Any:
        made = cs.Plan.from_json(text)
        str(made)
        return cs.apply(model, made)

    return read


def _scan(good: Path, place: Path, rng: random.Random) -> Callable[[], Any]:
    shutil.copytree(good / "scan", place)
    path = place / "scan.json"
    if rng.random() < 0.7:
        path.write_text(json.dumps(value_changed(json.loads(path.read_text()), rng)))
    else:
        path.write_bytes(bytes_changed(path.read_bytes(), rng))
    return lambda: str(Scan.load(place))


def _recipe(good: Path, place: Path, rng: random.Random) -> Callable[[], Any]:
    place.mkdir()
    path = place / "recipe.yaml"
    path.write_bytes(bytes_changed(RECIPE.encode(), rng))
    return lambda: read_recipe(path)


def _checkpoint(good: Path, place: Path, rng: random.Random) -> Callable[[], Any]:
    place.mkdir()
    path = place / "weights.pth"
    model = cs.load(good / "base")
    torch.save(model.state_dict(), path)
    path.write_bytes(bytes_changed(path.read_bytes(), rng))
    return lambda: cs.load_checkpoint(model, path)


def _onnx(good: Path, place: Path, rng: random.Random) -> Callable[[], Any]:
    place.mkdir()
    path = place / "model.onnx"
    path.write_bytes(bytes_changed((good / "model.onnx").read_bytes(), rng))
    model = cs.load(good / "folder")
    return lambda: cs.verify_onnx(path, model, batches=(1,))


KINDS: dict[str, Callable[[Path, Path, random.Random], Callable[[], Any]]] = {
    "folder": lambda good, place, rng: _folder(good, place, rng, CONFIG, False),
    "sealed folder": lambda good, place, rng: _folder(good, place, rng, CONFIG, True),
    "weights": lambda good, place, rng: _folder(good, place, rng, WEIGHTS, False),
    "plan": _plan,
    "scan": _scan,
    "recipe": _recipe,
    "checkpoint": _checkpoint,
}


def run(good: Path, place: Path, rng: random.Random, tries: int, *, runtime: bool = False) -> dict[str, Any]:
    """Damage and read ``tries`` times; returns how many were refused, read, and what went wrong.

    Args:
        good: one of everything, as the fixture of test_guard makes it.
        place: an empty folder.
        rng: decides everything.
        tries: how often.
        runtime: damage ONNX files too; ONNX Runtime itself may not survive that.
    """
    kinds = {**KINDS, **({"onnx": _onnx} if runtime else {})}
    saved = cs.load(good / "folder")
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    guard = Guard.installed()
    for number in range(tries):
        kind = list(kinds)[number % len(kinds)]
        here = place / f"try{number}"
        read = kinds[kind](good, here, rng)
        try:
            with guard.watching((here, good)), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                back = read()
            counts["read"] += 1
            # A sender can seal what he has changed: it is another model then, and nothing else has happened.
            if kind in ("folder", "weights") and not _same(back, saved):
                wrong.append(f"try {number}, {kind}: another model was loaded")
        except ConvSurgeryError:
            counts["refused"] += 1
        except (Exception, Violation) as error:
            wrong.append(f"try {number}, {kind}: {type(error).__name__}: {error!s:.300}")
            counts["broken"] += 1
        shutil.rmtree(here, ignore_errors=True)
    return {"tries": tries, **counts, "wrong": wrong}
