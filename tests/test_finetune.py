"""Fine-tuning and evaluation on the real digits, on the CPU."""

from __future__ import annotations

import copy
import csv
import io
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from convsurgery.adapt import DataSplit, EpochMetrics, FinetuneConfig, distillation_loss, evaluate, finetune, load_data
from convsurgery.adapt.guard import LossWatch
from convsurgery.adapt.progress import Lines, RichProgress, make_progress
from convsurgery.errors import ConvSurgeryError, DataError, ModelError, StorageError, TrainingError

CPU: dict[str, Any] = {"device": "cpu", "progress": False}


class Tiny(nn.Module):
    """Normalisation and dropout, so that buffers and random numbers take part."""

    num_classes, in_chans = 10, 1

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(32 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.drop(self.conv2(x).relu().flatten(1)))


def tiny(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


def save(model: nn.Module, path: Path) -> None:
    path.mkdir(parents=True)
    save_model(model, str(path / "model.safetensors"))


def digits(batch_size: int = 64) -> DataSplit:
    return load_data("digits", model=tiny(), img_size=16, batch_size=batch_size)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are too small for more, and threads that wait for a busy core take seconds instead of milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher() -> Tiny:
    """Trained once; tests may only run it."""
    model = tiny()
    finetune(model, digits(), epochs=4, lr=5e-3, **CPU)
    return model.eval()


class TestTraining:
    def test_learns_the_digits(self, tmp_path: Path) -> None:
        model = tiny()
        result = finetune(model, digits(), epochs=4, lr=5e-3, output=tmp_path / "run", save=save, **CPU)
        losses = [row.train_loss for row in result.history[1:]]
        assert losses == sorted(losses, reverse=True)
        assert result.initial.val_top1 < 30
        assert result.last.val_top1 > 93
        # The result speaks of the model the caller holds.
        measured = evaluate(model, digits().val)
        assert measured.top1 == result.last.val_top1
        assert measured.samples == 450
        assert {path.name for path in result.files} == {"metrics.csv", "best", "last"}
        assert same(load_file(tmp_path / "run/last/model.safetensors"), weights(model))

    def test_metrics_csv_is_the_history(self, tmp_path: Path, teacher: Tiny) -> None:
        result = finetune(tiny(1), digits(), teacher=teacher, epochs=2, output=tmp_path, save=save, **CPU)
        table = rows(tmp_path)
        assert list(table[0]) == list(EpochMetrics.columns())
        assert [row["epoch"] for row in table] == ["0", "1", "2"]
        assert table[0]["train_loss"] == ""
        for row, entry in zip(table, result.history, strict=True):
            for name, cell in row.items():
                value = getattr(entry, name)
                assert (cell == "") if value is None else float(cell) == pytest.approx(value, rel=1e-7)

    def test_distillation_raises_agreement(self, teacher: Tiny) -> None:
        before = weights(teacher)
        result = finetune(tiny(3), digits(), teacher=teacher, epochs=2, lr=3e-3, kd_alpha=1.0, **CPU)
        assert result.initial.agreement < 30
        assert result.last.agreement > 88
        assert result.last.kept == round(result.last.agreement * 450 / 100)
        assert same(weights(teacher), before)
        assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_labels_play_no_part_at_alpha_one(self, teacher: Tiny) -> None:
        """Wrong labels, a right teacher: only what comes from the teacher can be learned."""
        data = digits()
        wrong = copy.deepcopy(data.train.dataset)
        wrong.targets = (wrong.targets + 1) % 10
        split = load_data((wrong, data.val.dataset), batch_size=64)
        assert finetune(tiny(3), split, teacher=teacher, epochs=2, lr=3e-3, kd_alpha=1.0, **CPU).last.val_top1 > 85
        assert finetune(tiny(3), split, teacher=teacher, epochs=2, lr=3e-3, kd_alpha=0.0, **CPU).last.val_top1 < 15

    def test_best_is_the_best_epoch_and_may_be_the_start(self, tmp_path: Path, teacher: Tiny) -> None:
        model = copy.deepcopy(teacher)
        start = weights(model)
        data = digits()
        data.train.dataset.targets = (data.train.dataset.targets + 1) % 10
        result = finetune(model, data, epochs=1, lr=1e-2, output=tmp_path, save=save, **CPU)
        assert result.best_epoch == 0
        assert result.best.val_top1 > result.last.val_top1
        assert same(load_file(tmp_path / "best/model.safetensors"), start)

    def test_train_only(self) -> None:
        result = finetune(tiny(), digits().train, epochs=2, lr=3e-3, **CPU)
        assert result.last.val_top1 is None
        assert result.best_epoch == 2

    @pytest.mark.parametrize(
        "settings",
        [
            {"opt": "sgd", "lr": 0.05, "sched": "step", "sched_on_updates": False},
            {"opt": "lion", "sched": "none", "clip_grad": 1.0},
            {"sched": "wsd", "clip_grad": 0.1, "clip_mode": "agc", "smoothing": 0.1},
            {"sched": "multistep", "decay_milestones": [1], "clip_grad": 0.1, "clip_mode": "value"},
            {"grad_accum_steps": 3, "opt_betas": (0.9, 0.95), "opt_eps": 1e-6},
            {"amp": True, "layer_decay": 0.9},
        ],
        ids=lambda settings: "-".join(map(str, settings.values())),
    )
    def test_settings(self, settings: dict[str, Any]) -> None:
        model = tiny()
        before = weights(model)
        result = finetune(model, digits(), epochs=2, **{"lr": 2e-3, **settings}, **CPU)
        assert result.last.val_top1 > 55
        assert not same(weights(model), before)

    def test_learning_rate_follows_the_schedule(self) -> None:
        seen = finetune(tiny(), digits(), epochs=2, lr=1e-3, warmup_epochs=0, min_lr=1e-5, **CPU).history
        updates = len(digits().train)
        for row in seen[1:]:
            share = (row.epoch * updates - 1) / (2 * updates)
            assert row.lr == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * share)) / 2)

    def test_frozen_parameters_stay(self) -> None:
        model = tiny()
        model.conv1.requires_grad_(False)
        before = weights(model)
        finetune(model, digits(), epochs=1, lr=1e-2, **CPU)
        assert torch.equal(model.conv1.weight, before["conv1.weight"])
        assert not torch.equal(model.conv2.weight, before["conv2.weight"])

    def test_what_the_caller_had_is_as_before(self, teacher: Tiny) -> None:
        model, data, guide = tiny(), digits(), copy.deepcopy(teacher)
        model.train()
        model.bn1.eval()
        guide.train()
        attributes, sampler = set(vars(model)), data.train.batch_sampler.sampler
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        finetune(model, data, teacher=guide, epochs=1, amp=True, **CPU)
        assert torch.equal(torch.rand(3), expected)
        assert model.training
        assert not model.bn1.training
        assert model.conv2.training
        assert guide.training
        # Accelerate patches and marks what it prepares; the caller's model must not be it.
        assert set(vars(model)) == attributes
        assert all(parameter.grad is None for parameter in model.parameters())
        assert data.train.batch_sampler.sampler is sampler

    def test_calls_with_other_settings_share_a_process(self) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        own = Accelerator(cpu=True, mixed_precision="no")
        for amp in (False, True, False):
            model, seen = tiny(), set()
            model.conv2.register_forward_hook(lambda module, args, output, seen=seen: seen.add(output.dtype))
            finetune(model, digits(256), epochs=1, amp=amp, grad_accum_steps=1 + amp, **CPU)
            assert seen == {torch.bfloat16 if amp else torch.float32}
        assert own.mixed_precision == "no"
        AcceleratorState._reset_state(reset_partial_state=True)

    def test_amp_computes_in_bfloat16_and_keeps_float32_weights(self) -> None:
        seen = set()
        model = tiny()
        model.conv2.register_forward_hook(lambda module, args, output: seen.add((module.training, output.dtype)))
        finetune(model, digits(), epochs=1, amp=True, **CPU)
        assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
        assert model.conv2.weight.dtype == torch.float32


class TestReproducible:
    def test_same_seed_same_bits(self, teacher: Tiny) -> None:
        models = [tiny(), tiny(), tiny()]
        for model, seed in zip(models, (1, 1, 2), strict=True):
            torch.rand(int(torch.randint(1, 9, ())))  # what happened before must not matter
            finetune(model, digits(), teacher=teacher, epochs=2, seed=seed, **CPU)
        one, again, other = map(weights, models)
        assert same(one, again)
        assert not same(one, other)

    @pytest.mark.parametrize("stop", [0, 1, 2])
    @pytest.mark.parametrize("settings", [{}, {"sched": "step", "sched_on_updates": False, "opt": "sgd"}])
    def test_resumed_run_ends_where_an_uninterrupted_one_does(
        self, tmp_path: Path, settings: dict[str, Any], stop: int
    ) -> None:
        settings = {"epochs": 3, "lr": 2e-3, "save": save, **settings, **CPU}
        whole = tiny()
        expected = finetune(whole, digits(), output=tmp_path / "whole", **settings)

        def interrupt(row: EpochMetrics) -> None:
            if row.epoch == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finetune(tiny(), digits(), output=tmp_path / "parts", on_epoch=interrupt, **settings)
        assert len(rows(tmp_path / "parts")) == stop + 1
        model = tiny(99)  # its weights come from the folder
        result = finetune(model, digits(), output=tmp_path / "parts", resume=True, **settings)
        assert result.resumed_from == stop
        assert same(weights(model), weights(whole))
        assert result.best_epoch == expected.best_epoch
        plain = [{**row, "seconds": ""} for row in rows(tmp_path / "whole")]
        assert [{**row, "seconds": ""} for row in rows(tmp_path / "parts")] == plain

    def test_samplers_of_ones_own_resume_too(self, tmp_path: Path) -> None:
        def data() -> tuple[DataLoader[Any], DataLoader[Any]]:
            split = digits()
            generator = torch.Generator().manual_seed(1)
            sampler = WeightedRandomSampler([1.0] * 1347, 320, generator=generator)
            return DataLoader(split.train.dataset, 64, sampler=sampler), split.val

        def interrupt(row: EpochMetrics) -> None:
            if row.epoch == 1:
                raise KeyboardInterrupt

        settings = {"epochs": 2, "save": save, **CPU}
        whole, parts = tiny(), tiny()
        finetune(whole, data(), **settings)
        with pytest.raises(KeyboardInterrupt):
            finetune(parts, data(), output=tmp_path, on_epoch=interrupt, **settings)
        finetune(parts, data(), resume=tmp_path, **settings)
        assert same(weights(parts), weights(whole))

    def test_finished_run_trains_nothing_more_and_longer_trains_on(self, tmp_path: Path) -> None:
        model = tiny()
        settings = {"output": tmp_path, "save": save, "sched": "constant", **CPU}
        finetune(model, digits(), epochs=1, **settings)
        after = weights(model)
        assert finetune(model, digits(), epochs=1, resume=True, **settings).last.epoch == 1
        assert same(weights(model), after)
        assert finetune(model, digits(), epochs=2, resume=True, **settings).last.epoch == 2
        assert not same(weights(model), after)

    def test_run_killed_between_checkpoint_and_row(self, tmp_path: Path) -> None:
        finetune(tiny(), digits(256), epochs=1, output=tmp_path, save=save, sched="constant", **CPU)
        lines = (tmp_path / "metrics.csv").read_text().splitlines()
        (tmp_path / "metrics.csv").write_text("\n".join(lines[:-1]) + "\n1,0.")
        (tmp_path / "last").rename(tmp_path / ".last.old")
        finetune(tiny(), digits(256), epochs=2, output=tmp_path, save=save, sched="constant", resume=True, **CPU)
        assert [row["epoch"] for row in rows(tmp_path)] == ["0", "1", "2"]
        assert (tmp_path / "metrics.csv").read_text().startswith("\n".join(lines))


class Explodes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.zeros(()) if self.training else x


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.nan


class TestStops:
    def stop(self, model: nn.Module, **settings: Any) -> str:
        before = weights(model)
        with pytest.raises(TrainingError) as caught:
            finetune(model, settings.pop("data", None) or digits(), **settings, **CPU)
        assert all(tensor.isfinite().all() for tensor in weights(model).values())
        if "epoch 1," in str(caught.value):
            assert same(weights(model), before)
        return str(caught.value)

    def test_nan_names_the_module_and_what_to_change(self) -> None:
        model = tiny()
        model.drop = nn.Sequential(nn.Identity(), Explodes())
        text = self.stop(model, epochs=2, lr=1e-2)
        assert "training stopped at epoch 1, step 1: the loss is nan" in text
        assert "first output that is not finite: drop.1 (Explodes)" in text
        assert "smaller eps" in text
        assert "--lr" not in text  # nothing had been updated yet
        assert "back at its state before training" in text

    def test_nan_later_goes_back_to_the_last_epoch(self, tmp_path: Path) -> None:
        model, states = tiny(), {}
        model.drop = Explodes()
        model.drop.forward = lambda x: x * (math.nan if len(states) == 2 and model.training else 1)  # type: ignore[method-assign]
        text = self.stop(
            model,
            epochs=3,
            amp=True,
            clip_grad=0.5,
            output=tmp_path,
            save=save,
            on_epoch=lambda row: states.update({row.epoch: weights(model)}),
        )
        assert "epoch 2, step 1" in text
        assert "back at the end of epoch 1" in text
        assert "train without --amp" in text
        assert "--clip-grad" not in text  # was on already
        assert "lower the learning rate from 0.0001 to 1e-05 (--lr 1e-05)" in text
        assert "--warmup-epochs 1" in text
        assert same(weights(model), states[1])
        assert same(load_file(tmp_path / "last/model.safetensors"), states[1])
        assert (tmp_path / "best/model.safetensors").is_file()

    def test_bad_images_and_bad_weights_are_named(self) -> None:
        data = digits()
        data.train.dataset.images[:] = math.nan
        assert "the images of the batch themselves" in self.stop(tiny(), data=data, epochs=1)

        class Poisoned(Tiny):
            def train(self, mode: bool = True) -> Any:
                self.scale = 1 - mode
                return super().train(mode)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * (1.0 if not self.training else math.inf)

        assert "first output that is not finite: the model (Poisoned)" in self.stop(Poisoned(), epochs=1)

    def test_gradients(self) -> None:
        model = tiny()

        class Hidden(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return BadGradient.apply(x)

        model.drop = Hidden()
        text = self.stop(model, epochs=1)
        assert "the gradients are not finite" in text
        assert "gradients that are not finite: 5 parameters, the last one conv2.bias" in text

    def test_divergence(self, teacher: Tiny) -> None:
        """A trained model that a far too large learning rate takes back to guessing."""
        text = self.stop(copy.deepcopy(teacher), epochs=3, lr=1.0, warmup_epochs=1, warmup_lr=1e-6)
        assert "the loss diverges" in text
        assert "they had been at 0.0" in text
        assert "from 1 to 0.1 (--lr 0.1)" in text
        assert "--clip-grad 1.0" in text
        settings = {"epochs": 2, "lr": 1.0, "warmup_epochs": 1, "warmup_lr": 1e-6, "divergence": None, **CPU}
        assert finetune(copy.deepcopy(teacher), digits(), **settings).last.epoch == 2

    def test_watch(self) -> None:
        def steps(losses: list[float], factor: float | None = 4.0) -> int | None:
            watch = LossWatch(factor)
            watch.guess = 2.0
            return next((step for step, loss in enumerate(losses) if watch.diverged(loss)), None)

        assert steps([0.4] * 20 + [2.1] * 40) == 25
        assert steps([0.4] * 20 + [2.1] * 40, factor=None) is None
        # A hundred times the start, but better than guessing.
        assert steps([0.01] * 20 + [1.5] * 40) is None
        # Worse than guessing, but not much worse than it ever was.
        assert steps([1.0] * 20 + [3.0] * 40) is None
        # Outliers.
        assert steps(([0.4] * 20 + [1e9] * 4) * 3) is None
        # A fresh head starts high and comes down.
        assert steps([30.0 * 0.9**step for step in range(60)]) is None


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"opt": "adamm"}, r"no optimizer 'adamm' \(--opt\); did you mean .*'adam'"),
            ({"opt": "foo_adam"}, "no optimizer 'foo_adam'"),
            ({"sched": "cosin"}, r"sched cannot be 'cosin' \(--sched\); did you mean 'cosine'"),
            ({"lr": -1}, r"lr must be above 0, not -1 \(--lr\)"),
            ({"lr": math.nan}, "lr must be a finite number"),
            ({"lr": "fast"}, "lr must be a finite number, not 'fast'"),
            ({"epochs": 0}, "epochs must be at least 1"),
            ({"epochs": 2.5}, "epochs must be a whole number"),
            ({"kd_alpha": 1.5}, "kd_alpha must be at least 0 and at most 1"),
            ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1"),
            ({"epochs": 2, "warmup_epochs": 2}, "warmup_epochs must be below epochs"),
            ({"amp": 1}, "amp must be True or False"),
            ({"opt_betas": (0.9,)}, "opt_betas takes two numbers"),
            ({"opt_betas": 0.9}, "opt_betas must be a list"),
            ({"learning_rate": 1e-3}, "no setting 'learning_rate'"),
            ({"epoch": 1}, "no setting 'epoch'; did you mean 'epochs'"),
            ({"opt": "sgd", "layer_decay": 2}, "layer_decay must be above 0 and at most 1"),
            ({"sched": "wsd", "decay_epochs": 50}, "schedule 'wsd' cannot be made"),
            ({"eval_metric": "agreement"}, "needs a teacher"),
            ({"amp": True, "amp_dtype": "float16"}, r"float16 needs a GPU; .*--amp-dtype bfloat16"),
            ({"resume": True}, r"name that folder \(--output\)"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], text: str) -> None:
        with pytest.raises(TrainingError, match=text):
            finetune(tiny(), digits(), **settings, **CPU)

    def test_config_and_settings(self) -> None:
        config = FinetuneConfig(epochs=1, lr=3e-3)
        result = finetune(tiny(), digits(256), config=config, lr=1e-3, **CPU)
        assert (result.config.epochs, result.config.lr) == (1, 1e-3)

    def test_models(self, teacher: Tiny) -> None:
        with pytest.raises(ModelError, match="nothing to train"):
            finetune(tiny().requires_grad_(False), digits(), **CPU)
        model = tiny()
        with pytest.raises(ModelError, match="shares parameters"):
            finetune(model, digits(), teacher=copy.copy(model), **CPU)
        wide = tiny()
        wide.fc = nn.Linear(512, 11)
        with pytest.raises(ModelError, match="the teacher answers with 11 classes, the model with 10"):
            finetune(tiny(), digits(), teacher=wide, **CPU)
        with pytest.raises(ModelError, match="on the meta device and has no weights"):
            finetune(tiny().to("meta"), digits(), **CPU)
        with pytest.raises(ModelError, match=r"must answer with a tensor \(batch, classes\).*\(2, 16, 8, 8\)"):
            finetune(tiny().conv1, digits(), **CPU)

    def test_data_and_model_must_fit(self) -> None:
        wide = tiny()
        wide.fc = nn.Linear(512, 11)
        with pytest.raises(DataError, match=r"digits has 10 classes, the model has 11; .*--num-classes 10"):
            finetune(wide, digits(), **CPU)
        narrow = tiny()
        narrow.fc = nn.Linear(512, 9)
        split = digits()
        with pytest.raises(DataError, match=r"a label is 9, but the model has 9 classes .*--num-classes"):
            finetune(narrow, (split.train, split.val), **CPU)
        with pytest.raises(ModelError, match=r"cannot run images of shape \(2, 3, 16, 16\)"):
            finetune(tiny(), load_data("digits", img_size=16), **CPU)
        with pytest.raises(DataError, match=r"pair of tensors \(images, labels\), not dict"):
            finetune(tiny(), DataLoader([{"x": 1}]), **CPU)
        with pytest.raises(DataError, match="labels must be class numbers"):
            finetune(tiny(), DataLoader(TensorDataset(torch.zeros(4, 1, 16, 16), torch.zeros(4, 10))), **CPU)

    def test_folders(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        with pytest.raises(StorageError, match=r"nothing to resume in .*no last/training_state\.pt"):
            finetune(tiny(), digits(), output=run, resume=True, save=save, **CPU)
        settings = {"epochs": 1, "output": run, "save": save, **CPU}
        finetune(tiny(), digits(256), **settings)
        with pytest.raises(StorageError, match=r"already holds a run \(metrics\.csv, best, last\).*--resume"):
            finetune(tiny(), digits(256), **settings)
        with pytest.raises(TrainingError, match=r"changed: lr 0\.0001 → 0\.001"):
            finetune(tiny(), digits(256), lr=1e-3, resume=True, **settings)
        with pytest.raises(TrainingError, match="continued in its own folder"):
            finetune(tiny(), digits(256), resume=run, **{**settings, "output": tmp_path / "other"})
        small = Tiny()
        small.conv2 = nn.Conv2d(16, 32, 5, stride=2, padding=2)
        with pytest.raises(StorageError, match=r"the weights in .*last are not this model's: .*conv2\.weight"):
            finetune(small, digits(256), resume=True, **settings)
        finetune(tiny(), digits(256), overwrite=True, **settings)
        assert len(rows(run)) == 2
        (run / "last/training_state.pt").write_bytes(b"no such thing")
        with pytest.raises(StorageError, match="is not a training state"):
            finetune(tiny(), digits(256), resume=True, **settings)
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="cannot write to"):
            finetune(tiny(), digits(256), epochs=1, output=tmp_path / "file" / "run", save=save, **CPU)

    def test_foreign_training_state_runs_no_code(self, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
                return os.mkdir, (str(tmp_path / "attacked"),)

        save(tiny(), tmp_path / "last")
        torch.save({"format": 1, "epoch": Attack()}, tmp_path / "last/training_state.pt")
        with pytest.raises(StorageError, match="is not a training state"):
            finetune(tiny(), digits(), resume=tmp_path, save=save, **CPU)
        assert not (tmp_path / "attacked").exists()

    def test_failing_saver_leaves_the_last_checkpoint(self, tmp_path: Path) -> None:
        calls = []

        def full(model: nn.Module, path: Path) -> None:
            calls.append(path)
            save(model, path)
            if len(calls) > 2:
                raise OSError("no space left")

        with pytest.raises(StorageError, match=r"cannot write .*no space left"):
            finetune(tiny(), digits(256), epochs=1, output=tmp_path, save=full, **CPU)
        assert (tmp_path / "last/model.safetensors").is_file()
        assert (tmp_path / "best/model.safetensors").is_file()

    def test_every_error_is_of_the_family(self) -> None:
        assert all(issubclass(kind, ConvSurgeryError) for kind in (TrainingError, DataError, ModelError, StorageError))


class Fixed(nn.Module):
    """Answers with the scores that were given as images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


class TestEvaluate:
    def scores(self) -> DataLoader[Any]:
        scores = torch.tensor([[9.0, 1, 2, 3, 4, 5], [0, 9, 1, 2, 3, 4], [5, 4, 3, 2, 1, 0]])
        labels = torch.tensor([0, 0, 4])  # first place, last place, fifth place
        return DataLoader(TensorDataset(scores, labels), batch_size=2)

    def test_counts_samples_not_batches(self) -> None:
        result = evaluate(Fixed(), self.scores())
        assert result.top1 == pytest.approx(100 / 3)
        assert result.top5 == pytest.approx(200 / 3)
        assert result.samples == 3
        dataset = self.scores().dataset
        assert result.loss == pytest.approx(float(nn.functional.cross_entropy(*dataset.tensors)))
        assert (result.agreement, result.kept) == (None, None)

    def test_agreement(self) -> None:
        class Shifted(Fixed):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.where(x[:, :1] == 9, -x, x)

        result = evaluate(Fixed(), self.scores(), teacher=Shifted())
        assert (result.kept, result.samples) == (2, 3)
        assert result.agreement == pytest.approx(200 / 3)

    def test_nan_is_wrong_and_not_kept(self) -> None:
        scores = torch.tensor([[math.nan, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, math.nan]])
        loader = DataLoader(TensorDataset(scores, torch.tensor([0, 0, 1, 1])))
        result = evaluate(Fixed(), loader, teacher=Fixed())
        assert (result.top1, result.top5, result.kept) == (50, 50, 2)

    def test_modes_are_as_before(self, teacher: Tiny) -> None:
        model = tiny().train()
        model.bn1.eval()
        seen = []
        model.drop.register_forward_hook(lambda module, args, output: seen.append(module.training))
        evaluate(model, digits().val, teacher=teacher)
        assert not any(seen)
        assert model.drop.training
        assert not model.bn1.training

    def test_part_of_a_set(self) -> None:
        """A sampler that takes fewer samples than the set holds."""
        dataset = digits().val.dataset
        loader = DataLoader(dataset, 64, sampler=SubsetRandomSampler(range(100)))
        assert evaluate(tiny(), loader).samples == 100
        result = finetune(tiny(), (DataLoader(Subset(dataset, range(64)), 64), loader), epochs=1, **CPU)
        assert result.last.val_top1 == round(result.last.val_top1)

    def test_empty_and_teacher_of_other_classes(self) -> None:
        with pytest.raises(DataError, match="no samples"):
            evaluate(Fixed(), [])
        with pytest.raises(ModelError, match="cannot be compared"):
            evaluate(tiny(), digits().val, teacher=Fixed())


def test_distillation_loss() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = ((logits / 3).softmax(1) for logits in (teacher, student))
    expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
    assert float(distillation_loss(student, teacher, 3.0)) == pytest.approx(float(expected), rel=1e-5)


class TestProgress:
    def test_plain_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        finetune(tiny(), digits(256), epochs=2, log_interval=2, device="cpu")
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert lines[0].startswith("before training  val loss ")
        assert lines[1].startswith("epoch 1/2  step 2/5  loss ")
        assert sum(line.startswith("epoch 1/2  train loss ") for line in lines) == 1
        assert len(lines) == 1 + 2 * (2 + 1) + 1
        assert lines[-1].startswith("best epoch ")
        assert "\x1b" not in captured.err

    def test_silence(self, capfd: pytest.CaptureFixture[str]) -> None:
        finetune(tiny(), digits(256), epochs=1, **CPU)
        assert capfd.readouterr() == ("", "")

    def test_terminal_gets_a_bar(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        stream = Terminal()
        progress = make_progress(True, 1, stream)
        assert isinstance(progress, RichProgress)
        progress.begin_epoch(1, 2, 3)
        progress.step(3, 0.5, 1e-3)
        progress.note("epoch 1 [done]")
        progress.close()
        assert "epoch 1 [done]" in stream.getvalue()
        assert "3/3" in stream.getvalue()
        assert isinstance(make_progress(True, 1, io.StringIO()), Lines)


def test_adapt_imports_little() -> None:
    code = "import sys, convsurgery.adapt; print([n for n in ('accelerate', 'rich', 'sklearn') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SCRIPT = """
    import os, sys, torch
    from pathlib import Path
    from torch import nn
    from torch.utils.data import Subset
    sys.path.insert(0, {tests!r})
    from test_finetune import digits, save, tiny
    from convsurgery.adapt import finetune
    from convsurgery.errors import TrainingError

    torch.set_num_threads(1)
    out = Path({out!r})
    split = digits(32)
    # An odd number of validation samples: none may be counted twice, none forgotten.
    data = (split.train, torch.utils.data.DataLoader(Subset(split.val.dataset, range(449)), 32))
    model = tiny(int(os.environ["RANK"]))
    result = finetune(model, data, teacher=tiny(7), kd_alpha=0.0, epochs=2, lr=3e-3, device="cpu", save=save,
                      output=out / "run", log_interval=0)
    torch.save(model.state_dict(), out / f"rank{{torch.distributed.get_rank()}}.pt")
    model.conv1.register_forward_hook(
        lambda m, a, o: o * (float("nan") if m.training and torch.distributed.get_rank() == 1 else 1))
    try:
        finetune(model, data, epochs=1, device="cpu", progress=False)
    except TrainingError as error:
        (out / f"stopped{{torch.distributed.get_rank()}}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()
"""


def launch(tmp_path: Path, source: str, *command: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "train.py"
    here = Path(__file__).parent
    script.write_text(textwrap.dedent(source.format(tests=str(here), out=str(tmp_path))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", *command, str(script)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes(tmp_path: Path) -> None:
    done = launch(tmp_path, SCRIPT, "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    # One process tells; both end with the weights that lie in last/.
    assert done.stderr.count("before training") == 1
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(one, two)
    assert same(load_file(tmp_path / "run/last/model.safetensors"), one)
    table = rows(tmp_path / "run")
    assert [row["epoch"] for row in table] == ["0", "1", "2"]
    assert float(table[-1]["val_top1"]) > 80
    model = tiny()
    model.load_state_dict(one)
    val = DataLoader(Subset(digits().val.dataset, range(449)), 64)
    alone = evaluate(model, val, teacher=tiny(7))
    assert float(table[-1]["val_top1"]) == pytest.approx(alone.top1)
    assert int(table[-1]["kept"]) == alone.kept
    assert float(table[-1]["val_loss"]) == pytest.approx(alone.loss, rel=1e-5)
    # A process whose own batch was fine stops with the other one, and knows the place.
    for rank in (0, 1):
        assert "first output that is not finite: conv1 (Conv2d)" in (tmp_path / f"stopped{rank}.txt").read_text()


def test_accelerate_launch(tmp_path: Path) -> None:
    """On CPUs `accelerate launch` starts several processes through MPI only; one shows that its settings are heard."""
    source = """
        import sys
        sys.path.insert(0, {tests!r})
        from test_finetune import digits, tiny
        from convsurgery.adapt import finetune

        model, seen = tiny(), set()
        model.conv2.register_forward_hook(lambda module, args, output: seen.add(str(output.dtype)))
        finetune(model, digits(), epochs=1)
        print(seen)
    """
    done = launch(tmp_path, source, "accelerate.commands.launch", "--cpu", "--mixed_precision=bf16")
    assert done.stdout.strip() == "{'torch.bfloat16'}"
    assert "epoch 1/1  train loss" in done.stderr
