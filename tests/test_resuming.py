"""Runs that go on: of the same data, teacher and length, after any kill, one at a time, and in several processes."""

from __future__ import annotations

import copy
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_finetune import CPU, digits, launch, rows, same, save, tiny, weights
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import convsurgery as cs
from convsurgery.adapt import EpochMetrics, finetune, load_data
from convsurgery.adapt.processes import alone_among_processes, started_processes
from convsurgery.adapt.resuming import identity
from convsurgery.cli import run
from convsurgery.cli.options import teacher_named
from convsurgery.errors import ConvSurgeryWarning, SettingsError, StorageError, TrainingError
from convsurgery.files import RUNNING, alone, staging
from convsurgery.surgery import weights_of


def stop_at(epoch: int) -> Any:
    def interrupt(row: EpochMetrics) -> None:
        if row.epoch == epoch:
            raise KeyboardInterrupt

    return interrupt


def begun(folder: Path, data: Any, **settings: Any) -> None:
    """A run of four epochs that was stopped after the first."""
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny(), data, output=folder, save=save, on_epoch=stop_at(1), **{"epochs": 4, **settings}, **CPU)


def pictures(folder: Path, count: int, shade: int = 0, names: str = "{}.png") -> Path:
    for part in ("train", "val"):
        for label in "ab":
            (folder / part / label).mkdir(parents=True)
            for number in range(count):
                value = (20 * number + 100 * (label == "b") + shade) % 256
                Image.new("L", (16, 16), value).save(folder / part / label / names.format(number))
    return folder


def two_classes() -> nn.Module:
    model = tiny()
    model.fc, model.num_classes = nn.Linear(512, 2), 2
    return model


# --- the same run


def test_other_images_of_the_same_number_are_another_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 4, "workers": 0, "save": save, "img_size": 16}
    del settings["img_size"]
    one = load_data(pictures(tmp_path / "one", 4), input_size=(1, 16, 16), batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        finetune(two_classes(), one, output=tmp_path / "run", on_epoch=stop_at(1), **settings, **CPU)
    other = load_data(pictures(tmp_path / "other", 4, names="x{}.png"), input_size=(1, 16, 16), batch_size=4)
    with pytest.raises(TrainingError, match=r"changed: other training images \(.*one → .*other\), other validation"):
        finetune(two_classes(), other, output=tmp_path / "run", resume=True, **settings, **CPU)
    more = load_data(pictures(tmp_path / "more", 6), input_size=(1, 16, 16), batch_size=4)
    told = "updates per epoch 2 → 3, training images 8 → 12, validation images 8 → 12"
    with pytest.raises(TrainingError, match=f"changed: {told}"):
        finetune(two_classes(), more, output=tmp_path / "run", resume=True, **settings, **CPU)
    # A folder that was moved holds the same images.
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = load_data(tmp_path / "moved", input_size=(1, 16, 16), batch_size=4)
    assert finetune(two_classes(), moved, output=tmp_path / "run", resume=True, **settings, **CPU).last.epoch == 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, y: (TensorDataset(x + 1, y), None), "other training images"),
        (lambda x, y: (TensorDataset(x, (y + 1) % 10), None), "other training images"),
        (lambda x, y: (TensorDataset(x[:64], y[:64]), None), "updates per epoch 4 → 2, training images 96 → 64"),
        (lambda x, y: (Subset(TensorDataset(x, y), range(95, -1, -1)), None), "other training images"),
        (lambda x, y: (DataLoader(TensorDataset(x, y), 48, shuffle=True), None), "updates per epoch 4 → 2"),
    ],
)
def test_other_tensors_are_another_run(change: Any, text: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 1, 16, 16, generator=generator), torch.randint(10, (96,), generator=generator)
    settings: dict[str, Any] = {"batch_size": 24, "save": save, **CPU}
    begun(tmp_path, (TensorDataset(x, y), None), batch_size=24)
    with pytest.raises(TrainingError, match=f"a resumed run keeps .* changed: {text}"):
        finetune(tiny(), change(x, y), epochs=4, output=tmp_path, resume=True, **settings)
    assert finetune(tiny(), (TensorDataset(x, y), None), epochs=4, output=tmp_path, resume=True, **settings).best


def test_another_teacher_and_a_shorter_run_are_refused_and_all_is_named(tmp_path: Path) -> None:
    with pytest.warns(ConvSurgeryWarning, match="the teacher's weights are random"):
        begun(tmp_path, digits(256), teacher=tiny(5))
    settings: dict[str, Any] = {"output": tmp_path, "save": save, "resume": True, **CPU}
    with pytest.raises(TrainingError, match="changed: another teacher"):
        finetune(tiny(), digits(256), epochs=4, teacher=tiny(6), **settings)
    with pytest.raises(TrainingError, match="changed: distilling True → False"):
        finetune(tiny(), digits(256), epochs=4, **settings)
    told = r"changed: lr 0\.0001 → 0\.01, epochs 4 → 2, where it can only be made longer, another teacher"
    with pytest.raises(TrainingError, match=told):
        finetune(tiny(), digits(256), epochs=2, lr=1e-2, teacher=tiny(6), **settings)
    assert finetune(tiny(), digits(256), epochs=4, teacher=tiny(5), **settings).last.epoch == 4


def test_what_cannot_be_known_is_not_compared(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(zip(torch.randn(32, 1, 16, 16), torch.arange(32) % 10, strict=True))

    data = DataLoader(Stream(), 8)
    found = identity(load_data(data), None, 0)
    assert found["training images"] is None
    assert found["training set"] is None
    settings: dict[str, Any] = {"sched": "none", "output": tmp_path, "save": save, **CPU}
    finetune(tiny(), data, epochs=1, **settings)
    assert finetune(tiny(), data, epochs=2, resume=True, **settings).last.epoch == 2


@pytest.mark.parametrize("settings", [{}, {"sched": "step", "sched_on_updates": False, "decay_epochs": 3}])
def test_a_run_that_is_made_longer_goes_on_at_the_rate_of_the_new_length(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common: dict[str, Any] = {"lr": 1e-3, "warmup_epochs": 0, "save": save, "device": "cpu", "log_interval": 1}
    finetune(tiny(), digits(256), epochs=2, output=tmp_path / "a", **common, **settings)
    capsys.readouterr()

    def rates(epochs: int, **more: Any) -> list[str]:
        finetune(tiny(), digits(256), epochs=epochs, **more, **common, **settings)
        return [line.split("lr ")[1] for line in capsys.readouterr().err.splitlines() if "  step " in line]

    longer = rates(4, output=tmp_path / "a", resume=True)
    whole = rates(4)
    assert longer == whole[len(whole) // 2 :]
    assert float(longer[0]) >= 5e-4
    # Nothing else came of it: the epochs in between were those of a run of two.
    assert [row["epoch"] for row in rows(tmp_path / "a")] == ["0", "1", "2", "3", "4"]


# --- what is best


def test_of_equals_the_trained_one_is_best(tmp_path: Path) -> None:
    """A rate so small that no answer changes: the loss alone would let epoch 0 win or lose by rounding."""
    results = []
    for number, lr in enumerate((1e-12, 1e-6)):
        folder = tmp_path / str(number)
        model = tiny()
        model.bn1.momentum = 0.0
        data = digits()
        data.train.dataset.targets = (data.train.dataset.targets + 1) % 10  # what little is learned is wrong
        results.append(finetune(model, data, epochs=2, lr=lr, warmup_lr=0, output=folder, save=save, **CPU))
        top1 = {row.val_top1 for row in results[-1].history}
        assert len(top1) == 1
        assert results[-1].best_epoch > 0
        assert results[-1].history[0].val_loss <= results[-1].best.val_loss
    first = weights(tiny())
    assert not torch.equal(load_file(folder / "best/model.safetensors")["fc.weight"], first["fc.weight"])


def test_of_trained_equals_the_lower_loss_is_best_and_then_the_later() -> None:
    def best(*losses: float) -> int:
        history = [EpochMetrics(number, val_loss=loss, val_top1=50.0) for number, loss in enumerate(losses)]
        return max(history, key=lambda row: row.rank("top1")).epoch

    assert best(0.1, 0.3, 0.2) == 2
    assert best(0.1, 0.2, 0.3) == 1
    assert best(0.1, 0.2, 0.2) == 2
    history = [EpochMetrics(0, val_loss=0.1, val_top1=60.0), EpochMetrics(1, val_loss=0.1, val_top1=50.0)]
    assert max(history, key=lambda row: row.rank("top1")).epoch == 0


# --- killed before there was anything to go on from


@pytest.mark.parametrize("moment", ["best", "last"])
def test_a_run_that_was_cut_off_before_its_first_checkpoint_begins_anew(
    moment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "device": "cpu", "log_interval": 0}
    whole = tiny()
    finetune(whole, digits(256), output=tmp_path / "whole", save=save, **settings)

    def cut(model: nn.Module, path: Path) -> None:
        if path.name == moment:
            raise KeyboardInterrupt
        save(model, path)

    run_ = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny(), digits(256), output=run_, save=cut, **settings)
    with pytest.raises(StorageError, match="--resume"):
        finetune(tiny(), digits(256), output=run_, save=save, **settings)
    capsys.readouterr()
    model = tiny()
    result = finetune(model, digits(256), output=run_, save=save, resume=True, **settings)
    assert result.resumed_from is None
    assert f"nothing was finished in {run_} yet: the run begins anew" in capsys.readouterr().err
    assert same(weights(model), weights(whole))
    assert [{**row, "seconds": ""} for row in rows(run_)] == [
        {**row, "seconds": ""} for row in rows(tmp_path / "whole")
    ]


def test_a_checkpoint_that_was_taken_away_is_no_beginning(tmp_path: Path) -> None:
    finetune(tiny(), digits(256), epochs=1, output=tmp_path, save=save, **CPU)
    (tmp_path / "last").rename(tmp_path / "kept")
    with pytest.raises(StorageError, match=r"nothing to resume in .*no last/training_state\.pt"):
        finetune(tiny(), digits(256), epochs=1, output=tmp_path, save=save, resume=True, **CPU)
    assert (tmp_path / "best/model.safetensors").is_file()
    with pytest.raises(StorageError, match="nothing to resume"):
        finetune(tiny(), digits(256), epochs=1, output=tmp_path / "new", save=save, resume=True, **CPU)
    assert not (tmp_path / "new").exists()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_finetune import digits, save, tiny
    from convsurgery.adapt import finetune

    def kill(model, path):
        path.mkdir(parents=True)
        (path / "half").write_text("of it")
        os.kill(os.getpid(), signal.SIGKILL)

    finetune(tiny(), digits(256), epochs=2, output=Path({out!r}) / "run", save=kill, device="cpu", progress=False)
"""


def test_what_a_killed_run_leaves_is_gone_after_the_next(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path))))
    environment = {**os.environ, "PYTHONPATH": str(Path(cs.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert RUNNING in left
    assert any(".saving-" in name for name in left)
    model, whole = tiny(), tiny()
    settings: dict[str, Any] = {"epochs": 2, "save": save, **CPU}
    finetune(model, digits(256), output=tmp_path / "run", resume=True, **settings)
    finetune(whole, digits(256), **settings)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best", "last", "metrics.csv"]
    assert same(weights(model), weights(whole))


# --- one at a time


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(8, 1, 16, 16)
    with alone(tmp_path / "run"):
        for call in (
            lambda: finetune(tiny(), digits(256), epochs=1, output=tmp_path / "run", save=save, **CPU),
            lambda: cs.scan(model, "conv", x, latency=False, output=tmp_path / "run"),
        ):
            with pytest.raises(StorageError, match=r"another run is being written into .*run: wait until it has ended"):
                call()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [RUNNING]
    # What was made for nothing is not left behind.
    assert not (tmp_path / "run").exists()
    finetune(tiny(), digits(256), epochs=1, output=tmp_path / "run", save=save, **CPU)


def test_of_two_scans_at_once_one_is_refused_and_no_row_is_written_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(8, 1, 16, 16)
    started, refused = threading.Event(), []

    def second() -> None:
        started.wait()
        try:
            cs.scan(model, "conv | kerv-l2 by copy", x, latency=False, output=tmp_path, resume=True)
        except StorageError as error:
            refused.append(error)

    other = threading.Thread(target=second)
    other.start()

    def slow(row: Any) -> None:
        started.set()
        if not refused:
            other.join(30)

    found = cs.scan(model, "conv | kerv-l2 by copy", x, latency=False, output=tmp_path, on_row=slow)
    other.join()
    assert len(refused) == 1
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1 + len(found.rows)
    assert not (tmp_path / RUNNING).exists()
    again = cs.scan(model, "conv | kerv-l2 by copy", x, latency=False, output=tmp_path, resume=True)
    assert [row.key for row in again.rows] == [row.key for row in found.rows]
    with pytest.raises(StorageError, match="--overwrite"):
        cs.scan(model, "conv", x, latency=False, output=tmp_path)
    assert len(cs.scan(model, "conv", x, latency=False, output=tmp_path, overwrite=True).rows) == 2


def test_a_lock_of_a_killed_run_binds_nobody_and_young_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / RUNNING).touch()
    left = tmp_path / ".last.saving-abc"
    left.mkdir()
    (left / "half").touch()
    with staging(tmp_path, "busy") as busy, alone(tmp_path):
        assert not left.exists()
        assert busy.is_dir()  # somebody works there
    assert list(tmp_path.iterdir()) == []
    held: list[str] = []

    def enter(number: int) -> None:
        try:
            with alone(tmp_path):
                held.append("in")
                assert held.count("in") - held.count("out") == 1
                time.sleep(0.001)
                held.append("out")
        except StorageError:
            pass

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held[::2] == ["in"] * (len(held) // 2)
    assert held[1::2] == ["out"] * (len(held) // 2)


# --- who teaches


def test_a_random_head_teaches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from timm.models import _builder

    monkeypatch.setattr(_builder, "load_pretrained", lambda model, **_: None)  # the download
    for classes, told in (
        (None, "teacher: the model as it stands"),
        (7, "no teacher: the model's classifier is random"),
    ):
        model = cs.create_model("resnet10t", pretrained=True, num_classes=classes)
        new = cs.convert(model, "first-conv->kerv-poly")
        for part in (new, cs.load(cs.save(new, tmp_path / str(classes)))):
            guide, text = teacher_named(None, part)
            assert text.startswith(told)
            assert (guide is None) == (classes == 7)
            # Who asks for it gets it.
            assert teacher_named("start", part)[0] is not None
    new = cs.convert(cs.create_model("resnet10t"), "first-conv->kerv-poly")
    assert teacher_named(None, new) == (
        None,
        "no teacher: the model's weights are random, and teach nothing; plain cross-entropy",
    )
    new.reset_classifier(5)
    assert str(weights_of(new)) == "random at first, changed since"
    with pytest.warns(ConvSurgeryWarning, match=r"the teacher's weights are c3_in1k, random head: what it answers"):
        finetune(
            copy.deepcopy(cs.load(tmp_path / "7")),
            (TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)), None),
            teacher=cs.load(tmp_path / "7"),
            epochs=1,
            **CPU,
        )


def test_the_command_line_says_who_teaches_and_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["resnet10t", "--num-classes", "10", "--img-size", "32", "-r", "first-conv->kerv-poly"]
    assert run(["convert", *small, "-o", str(tmp_path / "random")]) == 0
    train = ["finetune", str(tmp_path / "random"), "--dataset", "digits", "--epochs", "1", "--log-interval", "0"]
    assert run([*train, "-o", str(tmp_path / "run"), "--lr", "1e-9", "--warmup-lr", "0"]) == 0
    captured = capsys.readouterr()
    assert "no teacher: the model's weights are random" in captured.out
    assert "weights before: random" in captured.out
    assert "no better than always answering the most frequent class" in captured.out
    assert run([*train, "-o", str(tmp_path / "run"), "--resume", "--lr", "1e-9", "--warmup-lr", "0", "-b", "64"]) == 1
    assert "changed: batch_size 128 → 64" in capsys.readouterr().err


# --- several processes


SCRIPT = """
    import os, sys, torch
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_finetune import digits, save, tiny
    from convsurgery.adapt import finetune

    torch.set_num_threads(1)
    out = Path({out!r})
    model = tiny(int(os.environ["RANK"]))
    # No device is named, and there is no GPU.
    result = finetune(model, digits(64), epochs=1, lr=3e-3, save=save, output=out / "run", log_interval=0)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save(model.state_dict(), out / f"rank{{rank}}of{{world}}.pt")
    (out / f"backend{{rank}}").write_text(torch.distributed.get_backend())
    torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_torchrun_without_a_gpu_trains_one_model(tmp_path: Path) -> None:
    done = launch(tmp_path, SCRIPT, "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    assert done.stderr.count("before training") == 1
    one, two = (torch.load(tmp_path / f"rank{rank}of2.pt", weights_only=True) for rank in (0, 1))
    assert same(one, two)
    assert same(load_file(tmp_path / "run/last/model.safetensors"), one)
    assert {(tmp_path / f"backend{rank}").read_text() for rank in (0, 1)} == {"gloo"}
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0", "1"]
    assert not (tmp_path / "run" / RUNNING).exists()


def test_torchrun_by_command_trains_one_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=10, in_chans=3).state_dict(), tmp_path / "w.safetensors")
    small = ["resnet10t", "--num-classes", "10", "--img-size", "32", "-r", "first-conv->kerv-poly"]
    assert run(["convert", *small, "--checkpoint", str(tmp_path / "w.safetensors"), "-o", str(tmp_path / "new")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "convsurgery"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(Path(cs.__file__).parents[1])
    train = ["finetune", str(tmp_path / "new"), "--dataset", "digits", "-o", str(tmp_path / "run"), "--epochs", "1"]
    train += ["--batch-size", "128", "--warmup-epochs", "0"]
    done = subprocess.run([*command, *train], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("before training") == 1
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0", "1"]
    scan = ["scan", str(tmp_path / "new"), "--operators", "conv", "--dataset", "digits", "-o", str(tmp_path / "scan")]
    refused = subprocess.run([*command, *scan], capture_output=True, text=True, env=environment, timeout=500)
    assert refused.returncode != 0
    assert "error: 2 processes were started, and scan is done by one" in refused.stderr
    assert not (tmp_path / "scan").exists()


@pytest.mark.parametrize("command", ["convert", "calibrate", "scan", "export", "run", "demo"])
def test_what_one_process_does_is_refused_to_several(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: resnet10t}}\ndata: {{dataset: digits}}\noutput: {tmp_path / 'out'}\n"
                      "finetune: {epochs: 1}\n")  # fmt: skip
    out = ["-o", str(tmp_path / "out")]
    arguments = {
        "convert": ["resnet10t", "-r", "first-conv->conv", *out],
        "calibrate": ["nowhere", "--teacher", "pretrained", "--dataset", "digits", *out],
        "scan": ["resnet10t", "--operators", "conv", "--dataset", "digits", *out],
        "export": ["nowhere", *out],
        "run": [str(recipe), "--set", f"output={tmp_path / 'out'}"],
        "demo": out,
    }[command]
    assert run([command, *arguments]) == 2
    assert f"4 processes were started, and {command} is done by one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_find_each_other_train_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert started_processes() == 1
    alone_among_processes("scan")
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.setenv(name, "3")
        assert started_processes() == 3
        with pytest.raises(SettingsError, match="3 processes were started"):
            alone_among_processes("scan")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "nonsense")
    assert started_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 1)
    monkeypatch.setattr("accelerate.state.PartialState._prepare_backend", lambda *_, **__: (None, "NO"))
    with pytest.raises(
        TrainingError, match="2 processes were started, and Accelerate sees 1: each would train a model"
    ):
        finetune(tiny(), digits(256), epochs=1, output=tmp_path / "run", save=save, **CPU)
    assert not (tmp_path / "run").exists()


def test_progress_may_go_anywhere() -> None:
    stream = io.StringIO()
    sys.stderr, kept = stream, sys.stderr
    try:
        finetune(tiny(), digits(256), epochs=1, device="cpu", log_interval=0)
    finally:
        sys.stderr = kept
    assert stream.getvalue().splitlines()[-1].endswith("; weights before: random")
