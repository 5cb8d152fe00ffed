"""Folders: bit-equal round trips, and what a damaged or foreign folder is told."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import MixedDtypeNet, RepeatedNet, ReversedNet, SharedNet, as_before
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.errors import StorageError
from convsurgery.surgery.storage import CONFIG, WEIGHTS


def assert_equal_models(a: nn.Module, b: nn.Module) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name
    assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]


RULES = [
    "all-conv->kerv-poly(degree=2, balance=0.5, learnable=channel)",
    "all-conv->kerv-gauss(learnable)",
    "all-conv->kerv-l2",
    "conv[k=3]->kerv-sigmoid; conv[k=1]->kerv-l1",
]


@pytest.mark.parametrize("rule", RULES)
def test_timm_round_trip_is_bit_equal(rule: str, tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=6, in_chans=1)
    new = cs.convert(model, rule)
    new.train()(torch.randn(4, 1, 64, 64)).sum().backward()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(parameter.grad, alpha=-1e-3)
    back = cs.load(cs.save(new, tmp_path / "out"))
    assert type(back) is type(model)
    assert not back.training
    assert_equal_models(back, new)
    x = torch.randn(2, 1, 64, 64)
    assert torch.equal(back(x), new.eval()(x))
    assert cs.record(back) == cs.record(new)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS}


def test_torchvision_round_trip(tmp_path: Path) -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=4).eval()
    new = cs.convert(model, "depthwise->kerv-poly")
    cs.save(new, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base"] == {"name": "torchvision/mobilenet_v3_small", "kwargs": {"num_classes": 4}}
    back, x = cs.load(tmp_path), torch.randn(1, 3, 64, 64)
    assert_equal_models(back, new)
    assert torch.equal(back(x), new(x))


def test_unconverted_model_round_trip(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=3)
    back = cs.load(cs.save(model, tmp_path))
    assert_equal_models(back, model)
    assert cs.record(back).edits == ()


@pytest.mark.parametrize("net", [SharedNet, RepeatedNet, ReversedNet, MixedDtypeNet])
def test_own_class_needs_its_base(net: type[nn.Module], tmp_path: Path, image: Tensor) -> None:
    model = net()
    new = cs.convert(model, "all-conv->kerv-gauss", example_inputs=image).eval()
    cs.save(new, tmp_path)
    with pytest.raises(StorageError, match=rf"class conftest\.{net.__name__}.*load\(directory, base=model\)"):
        cs.load(tmp_path)
    base = net()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    back = cs.load(tmp_path, base=base)
    assert_equal_models(back, new)
    assert torch.equal(back(image), new(image))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    for name in ("first", "second"):
        if hasattr(new, name):
            assert back.get_submodule(name) is back.first  # a shared module is shared again


def test_input_size_and_frozen_parameters_come_back(tmp_path: Path) -> None:
    model = cs.create_model("resnet10t", num_classes=10, in_chans=1, img_size=32)
    model.conv1[0].weight.requires_grad_(False)
    back = cs.load(cs.save(cs.convert(model, "first-conv->kerv-poly(learnable)"), tmp_path))
    assert not back.conv1[0].weight.requires_grad
    assert cs.plan(back, "last-conv->conv").input_shapes == ((1, 1, 32, 32),)


def test_absorbed_epsilon_comes_back(tmp_path: Path) -> None:
    model = timm.create_model("resnet18")
    new = cs.apply(model, as_before(cs.plan(model, "first-conv->kerv-poly")))
    assert new.bn1.eps != 1e-5
    assert cs.load(cs.save(new, tmp_path)).bn1.eps == new.bn1.eps


def test_fused_model_round_trip(tmp_path: Path) -> None:
    model = timm.create_model("resnet18").eval()
    fused = cs.fuse(cs.convert(model, "all-conv->kerv-l2"))
    back, x = cs.load(cs.save(fused, tmp_path)), torch.randn(1, 3, 64, 64)
    assert torch.equal(back(x), fused(x))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in back.modules())


def test_calibrated_affine_comes_back(tmp_path: Path) -> None:
    model, x = timm.create_model("resnet18").eval(), torch.randn(4, 3, 64, 64)
    new = cs.convert(model, "first-conv->kerv-l1", calibration=x)
    back = cs.load(cs.save(new, tmp_path))
    assert torch.equal(back.conv1.offset, new.conv1.offset)
    assert torch.equal(back(x), new(x))


def test_half_precision_and_channels_last(tmp_path: Path) -> None:
    model = timm.create_model("resnet18").to(torch.bfloat16).to(memory_format=torch.channels_last)
    new = cs.convert(model, "first-conv->kerv-gauss").eval()
    back = cs.load(cs.save(new, tmp_path))
    assert_equal_models(back, new)
    assert back.conv1.eps.dtype == back.conv1.kappa.dtype == torch.float32


def test_compiled_and_parallel_models_are_unwrapped(tmp_path: Path) -> None:
    new = cs.convert(timm.create_model("resnet18"), "first-conv->kerv-poly")
    back = cs.load(cs.save(torch.compile(nn.DataParallel(new)), tmp_path))
    assert_equal_models(back, new)


def test_model_built_with_other_options_is_not_given_a_wrong_base(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", act_layer=nn.SiLU)
    cs.save(cs.convert(model, "first-conv->kerv-poly"), tmp_path)
    with pytest.raises(StorageError, match="pass the unconverted model"):
        cs.load(tmp_path)


def test_saving_again_replaces_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    cs.save(timm.create_model("resnet18"), tmp_path)
    new = cs.convert(timm.create_model("resnet18"), "first-conv->kerv-poly")
    cs.save(new, tmp_path)
    assert_equal_models(cs.load(tmp_path), new)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_failed_save_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convsurgery.surgery import storage

    model = timm.create_model("resnet18", num_classes=2)
    cs.save(model, tmp_path)

    def full(model: nn.Module, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(storage, "_write_weights", full)
    with pytest.raises(StorageError, match=r"cannot save to .*no space left"):
        cs.save(timm.create_model("resnet18", num_classes=5), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    assert_equal_models(cs.load(tmp_path), model)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot save to"):
        cs.save(timm.create_model("resnet18"), tmp_path / "file")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = timm.create_model("resnet18", num_classes=2)
    return cs.save(cs.convert(model, "first-conv->kerv-poly"), tmp_path / "model")


def _edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    (folder / CONFIG).write_text(json.dumps(config))


def test_missing_folder_and_files(saved: Path) -> None:
    with pytest.raises(StorageError, match="there is no folder"):
        cs.load(saved / "nowhere")
    (saved / WEIGHTS).unlink()
    with pytest.raises(StorageError, match=r"not a saved model: model\.safetensors missing; it holds"):
        cs.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 7}, "has format 7"),
        ({"plans": None}, "has no 'plans'"),
        ({"plans": {}}, "'plans' is of the wrong kind"),
        ({"plans": [{}]}, "the plan has no 'format'"),
        ({"norms": {"nowhere": 1.0}}, "no module 'nowhere'"),
        ({"base": {}}, "base"),
        ({"base": {"name": "resnet19", "kwargs": {}}}, "cannot be built"),
        ({"base": {"name": "resnet50", "kwargs": {}}}, "does not fit"),
        ({"base": {"name": "resnet18", "kwargs": {"num_classes": 3}}}, "does not fit the model"),
    ],
)
def test_damaged_configuration(saved: Path, changes: dict[str, object], message: str) -> None:
    _edit(saved, **changes)
    with pytest.raises(StorageError, match=message):
        cs.load(saved)


def test_configuration_that_is_no_json(saved: Path) -> None:
    (saved / CONFIG).write_text("not json")
    with pytest.raises(StorageError, match="is not JSON"):
        cs.load(saved)


def test_corrupt_and_foreign_weights(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="cannot be read"):
        cs.load(saved)
    save_file({"x": torch.zeros(1)}, saved / WEIGHTS)
    with pytest.raises(StorageError, match="does not fit the model"):
        cs.load(saved)


def test_pickled_code_is_never_run(saved: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("pickled code was executed",))

    (saved / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(StorageError, match="cannot be read"):
        cs.load(saved)


def test_weight_file_is_plain_safetensors(saved: Path) -> None:
    held = load_file(saved / WEIGHTS)
    assert held["conv1.weight"].shape == (64, 3, 7, 7)
    assert "conv1.eps" in held


def _old_folder(folder: Path) -> None:
    """As it was written before there was a digest."""
    config = json.loads((folder / CONFIG).read_text())
    for key in ("weights", "preprocessing"):
        del config[key]
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def test_folders_of_before_are_read_with_a_note(saved: Path) -> None:
    new = cs.load(saved)
    _old_folder(saved)
    with pytest.warns(UserWarning, match="written before a digest"):
        back = cs.load(saved)
    assert_equal_models(back, new)


def test_exchanged_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = cs.save(
        cs.convert(timm.create_model("resnet18", num_classes=2), "first-conv->kerv-poly"), tmp_path / "other"
    )
    (other / WEIGHTS).replace(saved / WEIGHTS)
    with pytest.raises(StorageError, match=r"is not the file that was saved.*SHA-256"):
        cs.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"conv1.weight": state["conv1.weight"] * float("nan")}, "conv1.weight holds values"),
        (lambda state: state | {"fc.bias": state["fc.bias"] / 0}, "fc.bias holds values"),
        (
            lambda state: state | {"bn1.running_var": -state["bn1.running_var"]},
            "bn1.running_var holds variances below 0",
        ),
        (lambda state: state | {"fc.bias": state["fc.bias"].int()}, "fc.bias is torch.int32"),
    ],
)
def test_weights_are_looked_at_where_there_is_no_digest(saved: Path, change: Any, message: str) -> None:
    _old_folder(saved)
    save_file({name: value.contiguous() for name, value in change(load_file(saved / WEIGHTS)).items()}, saved / WEIGHTS)
    with pytest.raises(StorageError, match=message):
        cs.load(saved)


def test_not_a_number_is_not_saved(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(StorageError, match="holds NaN"):
        cs.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_infinity_in_a_buffer_comes_back(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.register_buffer("mask", torch.full((2,), -torch.inf))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    cs.save(Masked(), tmp_path)
    assert torch.equal(cs.load(tmp_path, base=Masked()).mask, torch.full((2,), -torch.inf))


def test_how_images_are_prepared_comes_back(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.7, "url": "http://x/y"}
    cs.save(model, tmp_path)
    back = cs.load(tmp_path)
    assert (back.pretrained_cfg["mean"], back.pretrained_cfg["crop_pct"]) == ((0.1, 0.2, 0.3), 0.7)
    assert "http://x/y" not in (tmp_path / CONFIG).read_text()


def test_files_have_the_usual_rights(tmp_path: Path) -> None:
    cs.save(timm.create_model("test_resnet"), tmp_path / "out")
    (tmp_path / "mine").write_text("")
    usual = (tmp_path / "mine").stat().st_mode
    assert [(tmp_path / "out" / name).stat().st_mode for name in (CONFIG, WEIGHTS)] == [usual, usual]


def _killed_at(number: int, act: Callable[[], object]) -> bool:
    """Run ``act`` in a child that is gone, without any clean-up, at its ``number``-th change to the disk."""
    child = os.fork()
    if child == 0:
        seen = [0]

        def hook(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"):
                seen[0] += 1
                if seen[0] == number:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "an earlier save", "a save without a digest"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(there: str, tmp_path: Path) -> None:
    old, new = timm.create_model("test_resnet", num_classes=2), timm.create_model("test_resnet", num_classes=5)
    folder, found = tmp_path / "out", set()
    for number in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        if there != "nothing":
            folder.mkdir()
        if "save" in there:
            cs.save(old, folder)
        if there == "a save without a digest":
            _old_folder(folder)
        killed = _killed_at(number, lambda: cs.save(new, folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if "save" not in there and not (folder / CONFIG).exists():
                with pytest.raises(StorageError, match=r"there is no folder|not a saved model"):
                    cs.load(folder)
                found.add("nothing")
            else:
                back = cs.load(folder)
                which = old if back.num_classes == 2 else new
                assert_equal_models(back, which)
                found.add("old" if which is old else "new")
        # Whatever is left of it, the next save is as any other, and clears it away once it is not young any more.
        if not killed:
            break
    assert not killed
    assert found == {"old" if "save" in there else "nothing", "new"}
    for path in (*tmp_path.iterdir(), *folder.iterdir()):
        os.utime(path, (0, 0))
    cs.save(old, folder)
    shutil.rmtree(folder) if there == "nothing" else None
    if there == "nothing":
        cs.save(new, folder)
    assert_equal_models(cs.load(folder), new if there == "nothing" else old)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_may_save_at_once(tmp_path: Path) -> None:
    """Whoever comes last: the pair belongs together."""
    models = [timm.create_model("test_resnet", num_classes=classes) for classes in (2, 3, 4)]
    cs.save(models[0], tmp_path)
    children = []
    for model in models:
        child = os.fork()
        if child == 0:
            try:
                for _ in range(5):
                    cs.save(model, tmp_path)
                    cs.load(tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    back = cs.load(tmp_path)
    assert_equal_models(back, models[back.num_classes - 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
