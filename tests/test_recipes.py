"""Recipe files: what they may hold, what is refused and where, and running one."""

from __future__ import annotations

import io
import re
from pathlib import Path

import onnx
import pytest
import torch
from rich.console import Console

import convsurgery as cs
from convsurgery.cli import run
from convsurgery.errors import RecipeError
from convsurgery.recipes import read_recipe, run_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
SMALL = """\
model:
  name: scaled_resnet18
  num_classes: 10
  img_size: 32
  kwargs: {width: 4, in_chans: 1}
data:
  dataset: digits
pretrain: {epochs: 1, batch_size: 128, lr: 1e-2, warmup_epochs: 0}
convert:
  rule: "conv[in=BasicBlock, k=3]->pnn(fanout=2)"
calibrate:
  images: 64
finetune:
  teacher: original
  epochs: 1
  batch_size: 128
  warmup_epochs: 0
export:
  tolerance: 1e-3
output: run
seed: 3
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL)
    return path


def test_recipe_is_read(written: Path) -> None:
    recipe = read_recipe(written)
    assert recipe.model.kwargs == {"width": 4, "in_chans": 1}
    assert recipe.pretrain is not None
    assert recipe.pretrain.lr == 0.01
    assert recipe.pretrain.seed == 3
    assert recipe.finetune is not None
    assert recipe.finetune.teacher == "original"
    assert recipe.calibrate is not None
    assert recipe.calibrate.images == 64
    assert recipe.export is not None
    assert recipe.export.tolerance == 1e-3


def test_values_can_be_set(written: Path) -> None:
    changes = ["finetune.epochs=7", "model.kwargs.width=8", "calibrate=null", "convert.start=random(1)", "seed=5"]
    recipe = read_recipe(written, changes)
    assert recipe.finetune is not None
    assert (recipe.finetune.settings.epochs, recipe.finetune.settings.seed) == (7, 5)
    assert recipe.model.kwargs["width"] == 8
    assert recipe.calibrate is None
    assert recipe.convert.start == "random(1)"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("finetune:", "finetun:", r"recipe.yaml, line 13: a recipe has no key 'finetun'; did you mean 'finetune'\?"),
        ("  images: 64", "  image: 64", r"line 12: calibrate has no key 'image'; did you mean 'images'\?"),
        ("  epochs: 1\n", "  epoch: 1\n", r"line 15: finetune has no key 'epoch'; did you mean 'epochs'\?"),
        ("  epochs: 1\n", "  epochs: 0\n", r"line 15: finetune: epochs must be at least 1, not 0"),
        ("  epochs: 1\n", "  epochs: many\n", r"line 15: finetune: epochs must be a whole number, not 'many'"),
        ("teacher: original", "teacher: origin", r"line 14: teacher cannot be 'origin'; did you mean 'original'\?"),
        ("images: 64", "images: true", r"line 12: calibrate.images must be a whole number, not True"),
        ("  name: scaled_resnet18\n", "", r"line 1: model needs 'name': timm's name"),
        ("  dataset: digits", "  download: true", r"line 6: data needs a dataset"),
        ("output: run\n", "", r"recipe.yaml: a recipe needs 'output'"),
        ("seed: 3", "seed: 3\nseed: 4", r"line 22: seed is given twice"),
        ("seed: 3", "seed: [", r"line 2\d: no YAML"),
        ("calibrate:\n  images: 64", "calibrate: 64", r"line 11: calibrate must be a mapping"),
        (SMALL, "- a list", r"a recipe is a mapping with the keys model, data"),
    ],
)
def test_what_has_no_place_is_refused(written: Path, old: str, new: str, message: str) -> None:
    assert old in SMALL
    written.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        read_recipe(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("finetune.epoch=1", r"--set finetune.epoch=1: finetune has no key 'epoch'; did you mean 'epochs'\?"),
        ("epochs", r"--set epochs: write KEY=VALUE"),
        ("seed.x=1", r"--set seed.x=1: seed holds no keys"),
        ("seed=[", r"--set seed=\[: '\[' is no YAML value"),
        ("finetune.lr=0", r"--set finetune.lr=0: finetune: lr must be above 0, not 0"),
    ],
)
def test_a_change_that_has_no_place_is_refused(written: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(written, [change])


def test_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read .*none.yaml: No such file"):
        read_recipe(tmp_path / "none.yaml")


def test_recipe_runs_from_the_command_line(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(written), "--set", "finetune.epochs=1"]) == 0
    out = capsys.readouterr().out
    for step in (
        "1. train scaled_resnet18",
        "2. convert: conv[in=BasicBlock",
        "3. calibrated on 64 of 1,347 images, seed 3, spread over 10 classes",
        "fine-tune",
    ):
        assert step in out
    errors = dict(re.findall(r"^(layer\S+)\s+pnn\s+least squares\s+\S+\s+([\d.]+)", out, re.MULTILINE))
    assert len(errors) == 16
    assert all(0 < float(error) < 1.5 for error in errors.values())
    assert max(len(line) for line in out.splitlines() if "wrote" not in line) <= 80
    loaded = cs.load("run/model")
    assert type(loaded.layer1[0].conv1).__name__ == "Perturbation2d"
    assert {node.op_type for node in onnx.load("run/model.onnx").graph.node} >= {"Perturbation2d"}
    assert (Path("run") / "finetuned" / "metrics.csv").is_file()
    assert run(["run", str(written)]) == 2
    assert "run holds an earlier run" in capsys.readouterr().err


def test_a_run_depends_on_its_seed_alone(written: Path) -> None:
    models = []
    for number in (1, 2):
        recipe = read_recipe(written, [f"output=run{number}", "export=null"])
        torch.manual_seed(number)
        models.append(run_recipe(recipe, console=Console(file=io.StringIO())))
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_rule_that_does_not_fit_is_told_before_anything_is_written(written: Path) -> None:
    with pytest.raises(cs.ConvSurgeryError, match="unknown operator 'pn'"):
        run_recipe(read_recipe(written, ["convert.rule=all-conv->pn"]))
    assert not Path("run").exists()


def test_a_recipe_may_only_train(written: Path) -> None:
    changes = ["convert=null", "calibrate=null", "pretrain=null", "model.name=rdnet_a", "model.kwargs={in_chans: 1}"]
    recipe = read_recipe(written, [*changes, "model.img_size=16", "finetune.teacher=none", "finetune.epochs=1"])
    model = run_recipe(recipe, console=Console(file=io.StringIO()))
    assert torch.equal(cs.load("run/model")(torch.ones(1, 1, 16, 16)), model(torch.ones(1, 1, 16, 16)))
    with pytest.raises(RecipeError, match="calibrate fits what a conversion put in place"):
        read_recipe(written, ["convert=null"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_come_along(path: Path) -> None:
    recipe = read_recipe(path)
    kwargs = {"num_classes": recipe.model.num_classes, "img_size": recipe.model.img_size, **(recipe.model.kwargs or {})}
    model = cs.create_model(recipe.model.name, device="meta", **kwargs)
    if recipe.convert is not None:
        assert cs.plan(model, recipe.convert.rule, start=recipe.convert.start).edits
    else:
        assert recipe.finetune is not None


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {
        "pnn_resnet18_cifar",
        "pnn_resnet50_cifar",
        "pnn_resnet18_digits",
        "rd_resnet18_digits",
        "rdnet_cifar10",
    }


AUTO = "conv[in=BasicBlock, k=3]->auto(pnn | linear-mix, params<=-10%)"


def test_a_recipe_may_leave_the_choice_to_auto(written: Path) -> None:
    changes = [f"convert.rule={AUTO}", "calibrate.images=160", "finetune=null", "export=null"]
    stream = io.StringIO()
    new = run_recipe(read_recipe(written, changes), console=Console(file=stream, width=80))
    done = cs.record(new)
    assert done is not None
    assert 0 < len(done.edits) < 16
    assert done.plans[-1].notes[-1].startswith("auto: ")
    assert "calibrated on 160 of 1,347 images, seed 3" in stream.getvalue()


def test_auto_without_images_is_refused_before_anything_runs(written: Path) -> None:
    recipe = read_recipe(written, [f"convert.rule={AUTO}", "calibrate=null"])
    with pytest.raises(RecipeError, match="give the recipe a step calibrate"):
        run_recipe(recipe)
    assert not (written.parent / "run").exists()


def test_settings_of_calibrate_and_export(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [
        *("pretrain=null", "convert.rule=first-conv->kerv-poly", "finetune.teacher=start"),
        *("calibrate={images: 32, target: 1.0e-2, batchnorm: true, steps: 2}",),
        *("export={tolerance: 1e-3, images: 16, dynamic_batch: false}",),
    ]
    recipe = read_recipe(written, changes)
    assert recipe.calibrate is not None
    assert (recipe.calibrate.target, recipe.calibrate.batchnorm, recipe.calibrate.steps) == (1e-2, True, 2)
    console = Console(file=io.StringIO(), width=120)
    new = run_recipe(recipe, console=console)
    layer = next(m for m in new.modules() if isinstance(m, cs.OperatorLayer))
    assert 0 < float(layer.eps) < 1  # what a target of 1e-2 allows
    file = onnx.load(written.parent / "run" / "model.onnx")
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_value > 0
    assert "images" in console.file.getvalue()  # type: ignore[attr-defined]
