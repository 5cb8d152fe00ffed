"""The command line, run for real: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from conftest import needs
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import convsurgery as cs
from convsurgery.adapt.scan import Scan, ScanRow
from convsurgery.cli import run
from convsurgery.errors import ExportError, StorageError
from convsurgery.surgery.storage import CONFIG

SMALL = ["resnet10t", "--num-classes", "10", "--img-size", "32"]


def cli(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convsurgery", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    weights = timm.create_model("resnet10t", num_classes=10).state_dict()
    save_file(weights, place / "mine.safetensors")
    rule = ["--rule", "first-conv->kerv-poly; conv[k=1]->kerv-l2", "--checkpoint", str(place / "mine.safetensors")]
    assert run(["convert", *SMALL, *rule, "-o", str(place / "out")]) == 0
    return place / "out"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--version", capsys=capsys)[:2] == (0, f"convsurgery {cs.__version__}\n")
    code, out, _ = cli("--help", capsys=capsys)
    assert code == 0
    for command in ("plan", "convert", "finetune", "export", "verify", "ops", "demo", "bench"):
        assert f"  {command} " in out


def test_plan_prints_the_table_of_the_api(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cli("plan", "resnet18", "--rule", "first-conv->kerv-poly", capsys=capsys)
    assert code == 0
    assert out == str(cs.plan("resnet18", "first-conv->kerv-poly")) + "\n"


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cli("plan", "torchvision/resnet18", "-r", "all-conv->kerv-l2", "--json", capsys=capsys)
    assert code == 0
    assert len(cs.Plan.from_json(out).edits) == 20


def test_plan_at_another_size(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = cli("plan", "resnet18", "-r", "first-conv->kerv-poly", "--img-size", 64, capsys=capsys)
    assert "resnet18 at 3x64x64" in out


def test_convert_writes_a_folder_that_loads(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = cs.load(converted)
    assert type(model.conv1[0]).__name__ == "PolyDial2d"
    code, out, _ = cli("plan", converted, "-r", "last-conv->kerv-gauss", capsys=capsys)
    assert code == 0
    assert "at 3x32x32" in out


def test_convert_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = timm.create_model("resnet10t", num_classes=10)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        arguments = ["convert", *SMALL, "-r", "all-conv->kerv-linear", "-o", tmp_path / "out", "--overwrite"]
        code, out, err = cli(*arguments, "--checkpoint", tmp_path / name, capsys=capsys)
        assert code == 0, err
        assert f"weights: checkpoint {name}" in out
        assert f"wrote {tmp_path / 'out'}" in out
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(cs.load(tmp_path / "out")(x), source.eval()(x))


def test_whole_way_by_command(converted: Path, tmp_path: Path) -> None:
    """finetune → export → verify as separate processes, on images in a folder."""
    for split, count in (("train", 6), ("val", 3)):
        for label in range(10):
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 40), (25 * label, 20 * number, 128)).save(folder / f"{number}.png")
    out = tmp_path / "tuned"
    tuned = process("finetune", converted, "--data-dir", tmp_path / "data", "-o", out, "--epochs", 1, "-b", 16,
                    "--warmup-epochs", 0, "--workers", 0, "--opt", "sgd", "--lr", "1e-3", check=False)  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    assert "teacher: the model as it stands before training" in tuned.stdout
    assert "best epoch" in tuned.stdout
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    exported = process("export", out / "last", "-o", tmp_path / "m.onnx", "--opset", 20)
    assert exported.returncode == 0, exported.stderr
    assert "same top-1 on 100.00%" in exported.stdout
    good = process("verify", tmp_path / "m.onnx", "--against", out / "last")
    assert (good.returncode, good.stderr) == (0, "")
    bad = process("verify", tmp_path / "m.onnx", "--against", converted)
    # One step of training changed little: a tight bound tells the two models apart.
    strict = process("verify", tmp_path / "m.onnx", "--against", converted, "--tolerance", "1e-6")
    assert strict.returncode == 1
    assert strict.stderr.startswith("error: m.onnx does not compute what the model computes")
    assert "Traceback" not in strict.stderr + bad.stderr


def test_finetune_by_dataset_name(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "finetune",
        converted,
        "--dataset",
        "digits",
        "-o",
        tmp_path / "run",
        "--epochs",
        1,
        "--teacher",
        "none",
    ]
    code, out, err = cli(*arguments, "--opt-betas", "0.9,0.95", "--log-interval", 0, capsys=capsys)
    assert code == 0, err
    assert "no teacher: plain cross-entropy" in out
    assert "epoch 1/1" in err
    assert (tmp_path / "run" / "best" / CONFIG).is_file()
    code, _, err = cli(*arguments, capsys=capsys)
    assert code == 2
    assert "--overwrite" in err
    code, _, _ = cli(*arguments, "--opt-betas", "0.9,0.95", "--resume", "--epochs", 2, capsys=capsys)
    assert code == 0
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4


def test_teacher_may_be_a_folder_or_a_weight_file(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = timm.create_model("resnet10t", num_classes=10)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    cs.save(source, tmp_path / "source")
    common = ["finetune", converted, "--dataset", "digits", "--epochs", 1, "--log-interval", 0]
    for number, teacher in enumerate((tmp_path / "w.safetensors", tmp_path / "source")):
        code, out, err = cli(*common, "-o", tmp_path / str(number), "--teacher", teacher, capsys=capsys)
        assert code == 0, err
        assert f"{teacher}" in out.splitlines()[0]
    code, _, err = cli(*common, "-o", tmp_path / "x", "--teacher", tmp_path / "nowhere", capsys=capsys)
    assert code == 2
    assert "no such folder or file" in err


def test_diverging_run_exits_with_1(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["finetune", converted, "--dataset", "digits", "-o", tmp_path / "run", "--opt", "sgd", "--lr", "1e6"]
    code, _, err = cli(*arguments, "--epochs", 2, "--warmup-epochs", 0, capsys=capsys)
    assert code == 1
    assert "--lr" in err


def test_ops_lists_the_registries(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cli("ops", capsys=capsys)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for name in cs.list_operators():
        assert name in out
    data = json.loads(cli("ops", "--json", capsys=capsys)[1])
    assert [item["name"] for item in data["operators"]] == cs.list_operators()
    poly = next(item for item in data["operators"] if item["name"] == "kerv-poly")
    assert [(a["name"], a["default"]) for a in poly["arguments"]] == [
        ("degree", 3),
        ("balance", 1.0),
        ("learnable", False),
    ]
    assert {item["name"] for item in data["places"]} == {place.name for place in cs.list_selectors()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "resnet18", "-r", "first-conv->kerv-pol"], "did you mean 'kerv-poly'?"),
        (["plan", "resnet81", "-r", "first-conv->kerv-poly"], "resnet18"),
        (["plan", "resnet18", "-r", "conv[k=5]->kerv-poly"], "near misses:"),
        (["plan", "resnet18"], "--rule"),
        (["plan"], "MODEL"),
        (["nonsense"], "nonsense"),
        (["convert", "resnet18", "-r", "first-conv->conv"], "--output"),
        (["finetune", "nowhere", "-o", "x", "--dataset", "digits"], "there is no folder nowhere"),
        (["finetune", "nowhere", "-o", "x"], "--data-dir"),
        (["export", "nowhere", "-o", "m.onnx"], "there is no folder nowhere"),
        (["verify", "m.onnx", "--against", "nowhere"], "there is no folder nowhere"),
        (["bench", "nonsense"], "no benchmark 'nonsense'"),
    ],
)
def test_bad_usage_exits_with_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*arguments, capsys=capsys)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "epochs must be"),
        (["--opt", "adamwww"], "adamw"),
        (["--sched", "cosin"], "cosine"),
        (["--opt-betas", "a,b"], "--opt-betas takes numbers with commas"),
        (["--dataset", "torch/cifar11"], "cifar10"),
    ],
)
def test_bad_settings_exit_with_2(
    flags: list[str], message: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [] if "--dataset" in flags else ["--dataset", "digits"]
    code, _, err = cli("finetune", converted, "-o", tmp_path / "run", *base, *flags, capsys=capsys)
    assert code == 2
    assert message in err


def test_weights_of_another_shape_name_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "w.safetensors")
    arguments = ["convert", *SMALL, "-r", "all-conv->conv", "-o", tmp_path / "out", "--checkpoint"]
    code, _, err = cli(*arguments, tmp_path / "w.safetensors", capsys=capsys)
    assert code == 2
    assert "fc.weight" in err
    assert "--num-classes" in err
    assert not (tmp_path / "out").exists()


def test_pretrained_without_network_names_the_file(tmp_path: Path) -> None:
    done = process("convert", "resnet18.a1_in1k", "--pretrained", "-r", "first-conv->kerv-poly", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "timm/resnet18.a1_in1k" in done.stderr
    assert "--checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = process("--debug", "plan", "resnet18", "-r", "first-conv->kerv-pol", cwd=tmp_path)
    assert "Traceback" in done.stderr
    assert "RuleError" in done.stderr


def test_defect_is_reported_as_such(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: object, **kwargs: object) -> nn.Module:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(cs, "plan", broken)
    code, _, err = cli("plan", "resnet18", "-r", "first-conv->conv", capsys=capsys)
    assert code == 1
    assert "ZeroDivisionError: on purpose" in err
    assert "--debug" in err


def test_demo_does_the_main_job(tmp_path: Path) -> None:
    done = process("demo", "-o", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    table = [line for line in lines if line.startswith(("first-conv->", "all-conv->")) and "450 of 450" in line]
    assert len(table) == 2
    for line in table:
        before, at_first = line.split()[1:3]
        assert before == at_first
        assert float(before) > 95
    listed = [line.split()[0] for line in lines[lines.index(next(x for x in lines if x.endswith("wrote:"))) + 1 :]]
    written = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(listed) == sorted(written)
    assert {"demo/original.onnx", "demo/first.onnx", "demo/all.onnx"} <= set(written)


def outputs(converted: Path, place: Path) -> dict[str, tuple[list[object], Path, Path]]:
    """A command, its output, and a file of it that would be replaced."""
    data = ["--dataset", "digits", "--images", 8]
    weights = converted.parent / "mine.safetensors"
    folder, file, scan, curve = place / "folder", place / "m.onnx", place / "scan", place / "curve.svg"
    return {
        "convert": (["convert", *SMALL, "-r", "first-conv->kerv-poly", "-o", folder], folder, folder / CONFIG),
        "calibrate": (
            ["calibrate", converted, "--teacher", weights, *data, "-o", folder],
            folder,
            folder / "model.safetensors",
        ),
        "export": (["export", converted, "-o", file], file, file),
        "scan": (
            ["scan", converted, "--operators", "conv", "--where", "last-conv", *data, "-o", scan],
            scan,
            scan / "rows.jsonl",
        ),
        "choose": (["choose", place / "found", "-b", "params<=-1%", "--curve", curve], curve, curve),
    }


@pytest.mark.parametrize("command", ["convert", "calibrate", "export", "scan", "choose"])
def test_what_is_there_is_replaced_only_when_asked(
    command: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output, part = outputs(converted, tmp_path)[command]
    if command == "choose":
        needs("matplotlib", "docs")
        row = ScanRow("a", 0, "pnn", "fit", 0.1, 0.1, 0.9, 10, 10)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Scan("net", (row,), 8, 100, 100, None, "FX").save(tmp_path / "found")
    code, _, err = cli(*arguments, capsys=capsys)
    assert code == 0, err
    before = part.read_bytes()
    part.write_bytes(before + b" ")
    code, out, err = cli(*arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert "--overwrite" in err
    assert str(output) in err
    assert part.read_bytes() == before + b" "
    if part.name == "rows.jsonl":
        before = before[: before.index(b"\n")]
    code, _, err = cli(*arguments, "--overwrite", capsys=capsys)
    assert code == 0, err
    assert part.read_bytes().startswith(before[:40])
    assert part.read_bytes() != before + b" "


@pytest.mark.parametrize("held", ["best", "last", "metrics.csv", "model.safetensors"])
def test_a_run_is_not_written_over(held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fault as it was met: a fine-tuned model was replaced by a fresh one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / held).touch()
    arguments = ["convert", *SMALL, "-r", "first-conv->kerv-poly", "-o", tmp_path / "out"]
    code, _, err = cli(*arguments, capsys=capsys)
    assert code == 2
    assert f"already holds {held}: overwrite=True (--overwrite) replaces it" in err
    (tmp_path / "out" / held).rename(tmp_path / "out" / "notes")
    assert cli(*arguments, capsys=capsys)[0] == 0  # what is not ours stays, and is in nobody's way
    assert (tmp_path / "out" / "notes").exists()


def test_demo_refuses_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").touch()
    code, _, err = cli("demo", "-o", tmp_path, capsys=capsys)
    assert code == 2
    assert "--overwrite" in err


def test_python_writers_refuse_when_told(converted: Path, tmp_path: Path) -> None:
    model = cs.load(converted)
    cs.save(model, tmp_path / "out", overwrite=False)
    with pytest.raises(StorageError, match=r"already holds convsurgery.json, model.safetensors: overwrite=True"):
        cs.save(model, tmp_path / "out", overwrite=False)
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(ExportError, match=r"m.onnx is there already: overwrite=True"):
        cs.export_onnx(model, tmp_path / "m.onnx", overwrite=False)
    assert (tmp_path / "m.onnx").read_text() == "mine"


@pytest.mark.parametrize("operator", ["linear-mix", "pnn", "lbc", "kerv-linear"])
def test_convert_and_then_calibrate(operator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What begins without data is fitted by the second command; what has nothing to fit ends well too."""
    save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    weights = ["--checkpoint", tmp_path / "w.safetensors"]
    rule = f"conv[name=layer2.*, k=3, s=1]->{operator}"
    assert cli("convert", *SMALL, *weights, "-r", rule, "-o", tmp_path / "a", capsys=capsys)[0] == 0
    arguments = ["calibrate", tmp_path / "a", "--teacher", tmp_path / "w.safetensors", "--dataset", "digits"]
    code, out, err = cli(*arguments, "--images", 32, "-o", tmp_path / "b", capsys=capsys)
    assert code == 0, err
    assert f"wrote {tmp_path / 'b'}" in out
    assert "weights: checkpoint w.safetensors" in out
    if operator == "kerv-linear":
        assert "nothing to fit: " in out
    else:
        assert "least squares" in out
        assert "images: 32 of 1,347 images, seed 0, spread over 10 classes" in out
    assert cs.load(tmp_path / "b").layer2 is not None
