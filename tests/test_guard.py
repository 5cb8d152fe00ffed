"""Files are data: whatever a file says, nothing is run, fetched, or touched outside of the named paths."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from guard import Guard, Violation, snapshot
from hostile import CHECKPOINTS, FOLDERS, ONNX, PLANS, RECIPES, SCANS, bomb
from torch import nn

import convsurgery as cs
from convsurgery.adapt import load_data
from convsurgery.adapt.scan import Scan
from convsurgery.cli import run
from convsurgery.errors import StorageError
from convsurgery.recipes import read_recipe
from convsurgery.surgery.storage import CONFIG, WEIGHTS

RULE = "first-conv->kerv-poly; conv[name=layer2.*, k=3]->pnn(fanout=2)"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good")
    make_good(place)
    return place


def make_good(place: Path) -> None:
    """One of everything: a saved folder, an ONNX file, a scan, a run; made before anybody watches."""
    torch.manual_seed(0)
    model = cs.create_model("test_resnet", num_classes=10, in_chans=1, img_size=32)
    cs.save(model, place / "base")
    new = cs.convert(model, RULE)
    cs.save(new, place / "folder")
    cs.export_onnx(new, place / "model.onnx")
    assert _cli("finetune", place / "folder", "-o", place / "run", "--dataset", "digits", *SHORT) == (0, "")
    options = ("--operators", "conv", "-o", place / "scan", "--dataset", "digits", "--images", "4", "--no-latency")
    assert _cli("scan", place / "base", *options, "--where", "first-conv")[0] == 0


SHORT = ("--epochs", "1", "-b", "256", "--warmup-epochs", "0", "--teacher", "none", "--log-interval", "0")


def _cli(*arguments: Any) -> tuple[int, str]:
    """Exit code of a command, and what it says on standard error when it fails."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = run([str(argument) for argument in arguments])
    return code, err.getvalue() if code else ""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, with a folder outside of it that nobody may touch, and a home that is none."""
    for name in ("work", "outside", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("HOME", "TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path


@contextlib.contextmanager
def untouched(place: Path, *reads: Path, writes: tuple[Path, ...] = ()) -> Iterator[None]:
    """Nothing is caused inside, and everything below ``place`` is as before but for ``writes``."""
    before = snapshot(place)
    with Guard.installed().watching(reads, writes):
        yield
    after = snapshot(place)
    own = tuple(str(path) for path in writes)
    changed = [path for path in {*before, *after} if before.get(path) != after.get(path)]
    changed = [path for path in changed if not (own and path.startswith(own))]
    # A folder's own time changes when something inside comes and goes again.
    assert not [path for path in changed if not os.path.isdir(path)], changed


@pytest.mark.parametrize(
    "attempt",
    [
        lambda place: __import__("socket").create_connection(("127.0.0.1", 9)),
        lambda place: subprocess.run(["true"], check=False),
        lambda place: os.system("true"),
        lambda place: (place / "outside" / "new").write_text(""),
        lambda place: (place / "outside" / "secret").read_text(),
        lambda place: (place / "work" / "link").read_text(),
        lambda place: (place / "outside" / "secret").unlink(),
        lambda place: (place / "outside").rename(place / "elsewhere"),
        lambda place: os.listdir(place / "outside"),
        lambda place: __import__("pickle").loads(b"cos\nsystem\n."),
        lambda place: exec("convsurgery_canary = 1"),
    ],
)
def test_the_guard_sees(attempt: Callable[[Path], Any], place: Path) -> None:
    (place / "outside" / "secret").write_text("x")
    (place / "work" / "link").symlink_to(place / "outside" / "secret")
    swallow = contextlib.suppress(BaseException)  # which does not help
    with pytest.raises(Violation), Guard.installed().watching((place / "work",)), swallow:
        attempt(place)


def test_good_files_are_read_under_guard(good: Path, place: Path) -> None:
    out = place / "work"
    with untouched(place, good, writes=(out,)):
        back = cs.load(good / "folder")
        assert not isinstance(back.conv1, nn.Conv2d)
        assert cs.Plan.from_json(cs.record(back).plans[0].to_json()) == cs.record(back).plans[0]
        assert len(Scan.load(good / "scan").rows) == 1
        assert _cli("plan", good / "base", "--rule", "first-conv->kerv-gauss") == (0, "")
        assert _cli("convert", good / "base", "--rule", "first-conv->kerv-gauss", "-o", out / "a") == (0, "")
        assert _cli("verify", good / "model.onnx", "--against", good / "folder") == (0, "")
        assert _cli("choose", good / "scan", "--budget", "agreement>=0")[0] == 0
    assert cs.load(out / "a") is not None


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_folders(name: str, good: Path, place: Path) -> None:
    folder, outside = place / "work" / "evil", place / "outside"
    shutil.copytree(good / "folder", folder)
    FOLDERS[name](folder, outside)
    with untouched(place, folder), pytest.raises(StorageError) as caught:
        cs.load(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 2000
    with untouched(place, folder):
        code, text = _cli("plan", folder, "--rule", "first-conv->conv")
    assert (code, text[:7]) == (2, "error: ")


COMMANDS: dict[str, tuple[Any, ...]] = {
    "plan": ("plan", "EVIL", "--rule", "first-conv->conv"),
    "convert": ("convert", "EVIL", "--rule", "first-conv->conv", "-o", "out"),
    "export": ("export", "EVIL", "-o", "out.onnx"),
    "verify": ("verify", "GOOD/model.onnx", "--against", "EVIL"),
    "finetune": ("finetune", "EVIL", "-o", "out", "--dataset", "digits", *SHORT),
    "teacher": ("finetune", "GOOD/folder", "-o", "out", "--dataset", "digits", "--epochs", "1", "--teacher", "EVIL"),
    "calibrate": ("calibrate", "EVIL", "-o", "out", "--teacher", "GOOD/base", "--dataset", "digits"),
    "calibrate by": ("calibrate", "GOOD/folder", "-o", "out", "--teacher", "EVIL", "--dataset", "digits"),
    "scan": ("scan", "EVIL", "--operators", "conv", "-o", "out", "--dataset", "digits", "--images", "4"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["kwargs: cfg with a file", "kwargs: cache", "base: name 3", "weights: pickle"])
def test_every_command_refuses(name: str, command: str, good: Path, place: Path) -> None:
    folder = place / "work" / "evil"
    shutil.copytree(good / "folder", folder)
    FOLDERS[name](folder, place / "outside")
    words = [str(word).replace("EVIL", str(folder)).replace("GOOD", str(good)) for word in COMMANDS[command]]
    with untouched(place, folder, good, place / "work"):
        code, text = _cli(*words)
    assert (code, "error: " in text, "defect" in text) == (2, True, False), text
    assert not list((place / "work").glob("out*"))


def test_a_folder_named_like_a_model_is_not_opened(good: Path, place: Path) -> None:
    evil = place / "work" / "test_resnet"
    shutil.copytree(good / "folder", evil)
    FOLDERS["kwargs: cfg with a file"](evil, place / "outside")
    err = io.StringIO()
    with untouched(place, place / "work"), contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        assert run(["plan", "test_resnet", "--rule", "first-conv->conv"]) == 0
    assert "the folder of that name is ./test_resnet" in err.getvalue()
    with untouched(place, place / "work"):
        code, text = _cli("plan", "./test_resnet", "--rule", "first-conv->conv")
    assert (code, "pretrained_cfg is nothing that a saved model holds" in text) == (2, True)


def test_a_folder_of_another_name_is_taken_and_said(good: Path, place: Path) -> None:
    shutil.copytree(good / "folder", place / "work" / "mine")
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        assert run(["plan", "mine", "--rule", "last-conv->conv"]) == 0
    assert "mine is taken as the saved model in ./mine" in err.getvalue()


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipes(name: str, good: Path, place: Path) -> None:
    outside, path = place / "outside", place / "work" / "recipe.yaml"
    for folder in (outside, place / "work"):
        bomb(folder / "evil.pth", outside)
    shutil.copy(good / "folder" / CONFIG, outside)
    shutil.copy(good / "folder" / WEIGHTS, outside)
    hostile = RECIPES[name].replace("OUTSIDE", str(outside))
    whole = {
        "model": "model: {name: test_resnet, num_classes: 10}",
        "data": "data: {dataset: digits}",
        "output": "output: out",
    }
    text = "\n".join([*(line for key, line in whole.items() if not hostile.startswith(f"{key}:")), hostile])
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with untouched(place, place / "work"):
        code, said = _cli("run", path)
    assert (code, said.startswith("error: "), "defect" in said) == (2, True, False), said
    assert "recipe.yaml" in said or "evil.pth" in said or "no data set" in said


def test_what_a_file_may_not_say_a_user_may(good: Path, place: Path) -> None:
    path = place / "work" / "recipe.yaml"
    path.write_text("model: {name: test_resnet}\ndata: {dataset: digits}\noutput: out\n")
    wanted = str(place / "outside" / "out")
    assert read_recipe(path, [f"output={wanted}"]).output == wanted
    assert read_recipe(path, ["model.name=hf-hub:timm/x"]).model.name == "hf-hub:timm/x"
    assert read_recipe(path, ["model.kwargs.pretrained_cfg_overlay={mean: 1}"]).model.kwargs is not None
    assert read_recipe(path, [f"model={{name: {good / 'folder'}}}"]).model.name == str(good / "folder")


@pytest.mark.parametrize("name", ONNX)
def test_hostile_onnx_files(name: str, good: Path, place: Path) -> None:
    path = place / "work" / "evil.onnx"
    shutil.copy(good / "model.onnx", path)
    ONNX[name](path, place / "outside")
    with untouched(place, path, good, writes=()):
        code, text = _cli("verify", path, "--against", good / "folder")
    assert code in (1, 2)
    assert text.startswith("error: ")
    assert "defect" not in text, text


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoints(name: str, good: Path, place: Path) -> None:
    path = CHECKPOINTS[name](place / "work" / "evil.pth", place / "outside")
    with untouched(place, path):
        code, text = _cli("convert", "test_resnet", "--checkpoint", path, "--rule", "first-conv->conv", "-o", "out")
    assert (code, text.startswith("error: "), "defect" in text) == (2, True, False), text
    with untouched(place, path, good):
        options = ("-o", place / "work" / "out", "--teacher", path, "--dataset", "digits")
        code, text = _cli("calibrate", good / "folder", *options)
    assert (code, "error: " in text, "defect" in text) == (2, True, False), text


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name not in ("head", "nan")])
def test_hostile_training_states(name: str, good: Path, place: Path) -> None:
    folder = place / "work" / "run"
    shutil.copytree(good / "run", folder)
    state = folder / "last" / "training_state.pt"
    state.unlink()
    CHECKPOINTS[name](state, place / "outside")
    with untouched(place, folder, good):
        code, text = _cli("finetune", good / "folder", "-o", folder, "--resume", "--dataset", "digits", *SHORT)
    assert (code, "error: " in text, "defect" in text) == (2, True, False), text


@pytest.mark.parametrize("name", PLANS)
def test_hostile_plans(name: str, place: Path) -> None:
    with untouched(place), pytest.raises(StorageError):
        cs.Plan.from_json(PLANS[name])


@pytest.mark.parametrize("name", SCANS)
def test_hostile_scans(name: str, good: Path, place: Path) -> None:
    folder = place / "work" / "scan"
    shutil.copytree(good / "scan", folder)
    (folder / "scan.json").write_text(SCANS[name])
    with untouched(place, folder):
        code, text = _cli("choose", folder, "--budget", "params<=0%")
    assert (code, text.startswith("error: "), "defect" in text) == (2, True, False), text
    (folder / "rows.jsonl").write_text(SCANS[name] + "\n" + SCANS[name] + "\n")
    # The rows are gone on with, so that this folder may change.
    with untouched(place, good, writes=(folder,)):
        options = ("--operators", "conv", "-o", folder, "--dataset", "digits", "--images", "4", "--resume")
        code, text = _cli("scan", good / "base", *options)
    assert (code, "error: " in text, "defect" in text) == (2, True, False), text


@pytest.mark.parametrize(
    "text", ["[]\n", "{}\n", '{"checks": 1, "input": 2}\n', "[" * 100_000 + "\n", '{"a": NaN}\n', "\0\n"]
)
def test_hostile_coverage_files(text: str, place: Path) -> None:
    path = place / "work" / "coverage.jsonl"
    path.write_text(text)
    with untouched(place, writes=(place / "work",)):
        code, said = _cli("coverage", "test_resnet", "-o", path)
    assert (code, said.startswith("error: "), "defect" in said) == (2, True, False), said
    assert path.read_text() == text


def test_images_that_are_programs_are_not_run(good: Path, place: Path) -> None:
    images = place / "work" / "images"
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (images / name).mkdir(parents=True)
        (images / name / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n%%EOF\n")
    with untouched(place, images, good):
        options = ("--teacher", good / "base", "--data-dir", images / "train")
        code, text = _cli("calibrate", good / "folder", "-o", place / "work" / "out", *options)
    assert (code, "is not an image" in text) == (2, True), text
    data = load_data(str(images))
    for loader in (data.train, data.val):
        with untouched(place, images), pytest.raises(RuntimeError, match="Failed to load"):
            next(iter(loader))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device", "link to a file", "link in a circle"])
def test_what_is_written_replaces_regular_files_alone(kind: str, good: Path, place: Path) -> None:
    target, other = place / "work" / "x.onnx", place / "outside" / "y.onnx"
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    elif kind == "link in a circle":
        target.symlink_to(target)
    elif kind == "link to a file":
        other.write_text("old")
        target.symlink_to(other)
    else:
        target.symlink_to("/dev/null") if kind.startswith("link") else None
    path = Path("/dev/null") if kind == "device" else target
    before = os.stat("/dev/null")
    code, text = _cli("export", good / "folder", "-o", path, *(["--overwrite"] if kind == "link to a file" else []))
    if kind == "link to a file":
        # Followed: the link stays, and the file behind it is the new one.
        assert (code, target.is_symlink(), other.read_bytes()[:1]) == (0, True, b"\x08")
    else:
        assert (code, text.startswith("error: cannot write")) == (2, True), text
    after = os.stat("/dev/null")
    assert (before.st_mode, before.st_ino, before.st_rdev) == (after.st_mode, after.st_ino, after.st_rdev)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_saving_does_not_write_through_links(name: str, good: Path, place: Path) -> None:
    folder, kept = place / "work" / "model", place / "outside" / "kept"
    shutil.copytree(good / "folder", folder)
    shutil.move(folder / name, kept)
    (folder / name).symlink_to(kept)
    before = kept.read_bytes()
    with pytest.raises(StorageError, match="no regular file"):
        cs.save(cs.load(good / "folder"), folder)
    assert kept.read_bytes() == before
    assert (folder / name).is_symlink()


def test_mutations(good: Path, tmp_path: Path) -> None:
    """A few of the random ones; ``python -m tests.guard 1000`` does the long run."""
    counts = damage.run(good, tmp_path, random.Random(0), int(os.environ.get("CONVSURGERY_MUTATIONS", "70")))
    assert counts["tries"] >= 70
    assert counts["refused"] > counts["tries"] // 2
    assert not counts["wrong"], counts["wrong"]
