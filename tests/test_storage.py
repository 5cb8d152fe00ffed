"""Folders: bit-equal round trips, and what a damaged or foreign folder is told."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import MixedDtypeNet, RepeatedNet, ReversedNet, SharedNet
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
    new = cs.convert(timm.create_model("resnet18"), "first-conv->kerv-poly")
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
    assert back.conv1.gain.dtype == torch.float32


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
    assert "conv1.scale" in held
