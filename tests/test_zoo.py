"""Models by name, weights by hand, input sizes, and what a model was built from; nothing here touches the network."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import urllib.error
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from convsurgery.errors import ModelError
from convsurgery.zoo import (
    Base,
    create_model,
    identify,
    input_size,
    list_models,
    load_checkpoint,
    preprocessing,
    set_preprocessing,
)

TINY = "mobilenetv3_small_050"


def tiny(**kwargs: Any) -> nn.Module:
    return create_model(TINY, num_classes=3, **kwargs)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


# Names and building


def test_base_goes_to_json_and_back() -> None:
    base = Base("timm/resnet18", {"num_classes": 10, "img_size": (64, 96)})
    assert base.name == "resnet18"
    text = json.dumps(base.to_json())
    assert Base.from_json(json.loads(text)) == base
    assert Base.from_json(json.loads(text)) != Base("resnet18", {"num_classes": 11, "img_size": (64, 96)})
    assert hash(base) == hash(Base.from_json(json.loads(text)))


def test_base_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(TypeError, match="JSON"):
        Base("resnet18", {"act_layer": nn.SiLU})
    with pytest.raises(ModelError, match="'name'"):
        Base.from_json({"kwargs": {}})
    with pytest.raises(ModelError, match="'kwargs'"):
        Base.from_json({"name": "resnet18", "kwargs": [1]})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", timm.models.resnet.ResNet),
        ("timm/resnet18", timm.models.resnet.ResNet),
        ("resnet18.a1_in1k", timm.models.resnet.ResNet),
        ("torchvision/resnet18", torchvision.models.ResNet),
        ("torchvision/r3d_18", torchvision.models.video.VideoResNet),
        ("torchvision/fcn_resnet50", torchvision.models.segmentation.FCN),
        ("torchvision/fasterrcnn_resnet50_fpn", torchvision.models.detection.FasterRCNN),
        ("torchvision/regnet_y_400mf", torchvision.models.RegNet),
    ],
)
def test_create_builds_the_named_model(name: str, kind: type) -> None:
    model = create_model(name, num_classes=7, device="meta")
    assert type(model) is kind
    assert not model.training
    assert model._convsurgery_base == Base(name, {"num_classes": 7})
    again = create_model(model._convsurgery_base.name, device="meta", **model._convsurgery_base.kwargs)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert all(value.is_meta for value in model.parameters())


def test_meta_build_of_a_giant_allocates_nothing() -> None:
    model = create_model("vit_giant_patch14_dinov2", device="meta")
    assert sum(value.numel() for value in model.parameters()) > 1_000_000_000
    assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))


def test_base_survives_a_deep_copy_and_stays_out_of_the_weights() -> None:
    model = create_model("timm/resnet18", num_classes=5, device="meta")
    assert copy.deepcopy(model)._convsurgery_base == Base("resnet18", {"num_classes": 5})
    assert not [key for key in model.state_dict() if "convsurgery" in key]


def test_arguments_without_a_json_form_leave_no_base() -> None:
    model = create_model("resnet18", act_layer=nn.SiLU, device="meta")
    assert type(model.act1) is nn.SiLU
    assert not hasattr(model, "_convsurgery_base")
    assert identify(model) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet81", "'resnet18'"),
        ("torchvision/resnet17", "'torchvision/resnet18'"),
        ("torchvision/convnext_atto", "'convnext_atto'"),
        ("shufflenet_v2_x1_0", "'torchvision/shufflenet_v2_x1_0'"),
        ("s3d", "'torchvision/s3d'"),
        ("qqqqqqqqqq", "list_models"),
        ("microsoft/resnet-18", "hf-hub:microsoft/resnet-18"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        create_model(name)
    assert name.removeprefix("torchvision/") in str(caught.value)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 400


def test_unknown_tag_lists_the_tags() -> None:
    with pytest.raises(ModelError, match=r"'resnet18' has no weights tagged 'a9'; its tags are a1_in1k, a2_in1k"):
        create_model("resnet18.a9")


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18"])
def test_arguments_the_builder_refuses(name: str) -> None:
    with pytest.raises(
        ModelError, match=rf"^{name} cannot be built with wings=2: .*unexpected keyword argument 'wings'"
    ):
        create_model(name, wings=2)


def test_arguments_refused_before_building() -> None:
    with pytest.raises(ModelError, match="checkpoint=FILE"):
        create_model("resnet18", checkpoint_path="x.pth")
    for size in (0, (32, -1), "big", (1, 2, 3)):
        with pytest.raises(ModelError, match="img_size must be a positive number"):
            create_model("resnet18", img_size=size)
    with pytest.raises(ModelError, match="meta device holds no weights"):
        create_model("resnet18", pretrained=True, device="meta")


def test_list_models() -> None:
    assert "resnet18" in list_models()
    assert "torchvision/resnet18" in list_models()
    assert list_models("torchvision/vgg11*") == ["torchvision/vgg11", "torchvision/vgg11_bn"]
    assert list_models("timm/resnet18.a*_in1k") == ["resnet18.a1_in1k", "resnet18.a2_in1k", "resnet18.a3_in1k"]
    assert list_models("no-such-*") == []


# Pretrained weights


def offline(*args: Any, **kwargs: Any) -> Any:
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("check your connection")


def test_timm_download_failure_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    with pytest.raises(ModelError) as caught:
        create_model(TINY, pretrained=True)
    text = str(caught.value)
    assert "model.safetensors of the hub repository timm/mobilenetv3_small_050.lamb_in1k" in text
    assert "--checkpoint FILE" in text
    assert "checkpoint=FILE" in text
    assert "check your connection" in text


def test_hub_repository_download_failure_names_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    with pytest.raises(ModelError, match=r"config\.json .*huggingface\.co/org/name .*local-dir:FOLDER"):
        create_model("hf-hub:org/name")


def test_torchvision_download_failure_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, *args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ModelError) as caught:
        create_model("torchvision/mobilenet_v3_small", pretrained=True)
    assert "https://download.pytorch.org/models/mobilenet_v3_small-047dcff4.pth" in str(caught.value)
    assert "--checkpoint FILE" in str(caught.value)


def test_a_real_download_without_network_fails_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Offline mode because the hub's client otherwise repeats the attempt for most of a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"^{TINY}: the weights model.safetensors of the hub repository"):
        create_model(TINY, pretrained=True, cache_dir=str(tmp_path))


def test_models_without_weights_list_the_tags_that_have_some(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(n for n in timm.list_models() if not timm.is_model_pretrained(n) and timm.get_pretrained_cfg(n))
    with pytest.raises(ModelError, match=f"no pretrained weights for '{name}'"):
        create_model(name, pretrained=True)
    bare = timm.models.PretrainedCfg(architecture="resnet18")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: bare)
    with pytest.raises(ModelError, match=r"no pretrained weights for 'resnet18'; with weights: resnet18\.a1_in1k, "):
        create_model("resnet18", pretrained=True)


def test_torchvision_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    urls: list[str] = []

    def fail(url: str, *args: Any, **kwargs: Any) -> Any:
        urls.append(url)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ModelError, match="resnet50-0676ba61"):
        create_model("torchvision/resnet50", weights="IMAGENET1K_V1")
    with pytest.raises(ModelError, match="resnet50-11ad3fa6"):
        create_model("torchvision/resnet50", pretrained=True)
    with pytest.raises(ModelError, match="no weights 'V9'; known: IMAGENET1K_V1, IMAGENET1K_V2"):
        create_model("torchvision/resnet50", weights="V9")
    with pytest.raises(ModelError, match="torchvision has no model 'vgg11x'"):
        create_model("torchvision/vgg11x", pretrained=True)
    assert len(urls) == 2


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """What the download returns, under "state"."""
    held: dict[str, dict[str, torch.Tensor]] = {}
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: dict(held["state"]))
    return held


def test_torchvision_pretrained_is_loaded(served: dict[str, dict[str, torch.Tensor]]) -> None:
    served["state"] = weights(torchvision.models.mobilenet_v3_small())
    model = create_model("torchvision/mobilenet_v3_small", pretrained=True)
    assert same(weights(model), served["state"])
    assert model._convsurgery_base == Base("torchvision/mobilenet_v3_small")


def test_torchvision_pretrained_with_other_classes_keeps_all_but_the_head(
    served: dict[str, dict[str, torch.Tensor]],
) -> None:
    served["state"] = weights(torchvision.models.mobilenet_v3_small())
    model = create_model("torchvision/mobilenet_v3_small", pretrained=True, num_classes=4)
    got = weights(model)
    head = {"classifier.3.weight", "classifier.3.bias"}
    assert got["classifier.3.weight"].shape == (4, 1024)
    assert got.keys() == served["state"].keys()
    assert all(torch.equal(got[key], served["state"][key]) for key in got.keys() - head)
    assert model._convsurgery_base == Base("torchvision/mobilenet_v3_small", {"num_classes": 4})


def test_torchvision_googlenet_keeps_what_its_weights_expect(served: dict[str, dict[str, torch.Tensor]]) -> None:
    served["state"] = weights(torchvision.models.googlenet(init_weights=False))
    model = create_model("torchvision/googlenet", pretrained=True, num_classes=4)
    assert model.transform_input is True
    assert model.aux1 is None
    base = Base("torchvision/googlenet", {"aux_logits": False, "transform_input": True, "num_classes": 4})
    assert model._convsurgery_base == base
    again = create_model(base.name, device="meta", **base.kwargs)
    assert again.transform_input is True
    assert again.state_dict().keys() == model.state_dict().keys()


def test_torchvision_file_in_place_of_the_download(tmp_path: Path) -> None:
    donor = torchvision.models.googlenet(init_weights=False)
    torch.save(donor.state_dict(), tmp_path / "g.pth")
    model = create_model("torchvision/googlenet", pretrained=True, checkpoint=tmp_path / "g.pth")
    assert model.transform_input is True
    assert same(weights(model), weights(donor))


# Checkpoints by hand


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    torch.manual_seed(1)
    return tiny()


def averaged(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    return {"state_dict": other, "state_dict_ema": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("w.safetensors", None),
        ("w.pth", lambda state: state),
        ("w.pt", lambda state: {"state_dict": state, "epoch": 3}),
        ("w.bin", lambda state: {"model": state, "optimizer": {"lr": 0.1}}),
        ("w.pth.tar", averaged),
        ("w.pth", lambda state: OrderedDict(("module." + key, value) for key, value in state.items())),
        ("w.pth", lambda state: {"state_dict": {"module._orig_mod." + key: value for key, value in state.items()}}),
        ("w.pth", lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}),
    ],
)
def test_checkpoint_forms(tmp_path: Path, donor: nn.Module, file: str, wrap: Any) -> None:
    path = tmp_path / file
    if wrap is None:
        save_file(donor.state_dict(), path)
    else:
        torch.save(wrap(weights(donor)), path)
    model = tiny()
    assert not same(weights(model), weights(donor))
    load_checkpoint(model, path)
    assert same(weights(model), weights(donor))
    assert same(weights(tiny(checkpoint=str(path))), weights(donor))


def test_checkpoint_keeps_the_models_dtype(tmp_path: Path, donor: nn.Module) -> None:
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    model = tiny().bfloat16()
    load_checkpoint(model, tmp_path / "w.safetensors")
    assert model.conv_stem.weight.dtype is torch.bfloat16
    assert torch.equal(model.conv_stem.weight, donor.conv_stem.weight.bfloat16())


class Payload:
    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (open, (self.witness, "w"))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Payload(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(str(tmp_path / "ran")), protocol=2))
    for file in ("evil.pth", "plain.pth"):
        with pytest.raises(ModelError, match=rf"{file} holds more than tensors \(\S+open\).*weights_only=True"):
            load_checkpoint(tiny(), tmp_path / file)
    (tmp_path / "newer.pth").write_bytes(pickle.dumps(Payload(str(tmp_path / "ran")), protocol=4))
    with pytest.raises(ModelError, match="cannot be read as a PyTorch checkpoint") as caught:
        load_checkpoint(tiny(), tmp_path / "newer.pth")
    assert "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(ModelError, match=r"holds more than tensors \(torch.nn.modules.linear.Linear\)"):
        load_checkpoint(tiny(), tmp_path / "model.pth")


def test_unreadable_files(tmp_path: Path, donor: nn.Module) -> None:
    torch.save(donor.state_dict(), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for file in ("cut.pth", "empty.pth", "text.pth"):
        with pytest.raises(ModelError, match=f"{file} cannot be read as a PyTorch checkpoint, it is damaged"):
            load_checkpoint(tiny(), tmp_path / file)
    save_file(donor.state_dict(), tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.safetensors").write_text("<html>404</html>")
    for file in ("cut.safetensors", "text.safetensors"):
        with pytest.raises(ModelError, match=f"{file} cannot be read as safetensors"):
            load_checkpoint(tiny(), tmp_path / file)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no checkpoint at .*absent\.pth"):
        create_model(TINY, checkpoint=tmp_path / "absent.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ModelError, match="is not a file"):
        load_checkpoint(tiny(), tmp_path / "folder.pth")
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(ModelError, match=r"ends in one of \.safetensors, \.pth"):
        load_checkpoint(tiny(), tmp_path / "w.npz")
    for name, held, text in (
        ("tensor", torch.zeros(2), "holds a Tensor, not a state dict"),
        ("numbers", {"lr": 0.1}, "'lr' is a float, not a tensor"),
        ("nothing", {}, "holds no weights"),
    ):
        torch.save(held, tmp_path / f"{name}.pth")
        with pytest.raises(ModelError, match=text):
            load_checkpoint(tiny(), tmp_path / f"{name}.pth")


def refused(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> str:
    """The text of the refusal; the model must be as before."""
    save_file(state, path)
    before = weights(model)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(model, path)
    assert same(weights(model), before)
    return str(caught.value)


def test_missing_and_unexpected_keys_are_named(tmp_path: Path, donor: nn.Module) -> None:
    state = weights(donor)
    state["stem.weight"] = state.pop("conv_stem.weight")
    text = refused(tiny(), state, tmp_path / "w.safetensors")
    assert "missing in the file: conv_stem.weight\n" in text
    assert "unknown to the model: stem.weight" in text
    text = refused(tiny(), weights(torchvision.models.alexnet()), tmp_path / "w.safetensors")
    listed = text.split("unknown to the model: ")[1].splitlines()[0]
    assert listed.count("features.") + listed.count("classifier.") <= 5
    assert "(14 in all)" in listed or "(15 in all)" in listed or "(16 in all)" in listed


def test_other_shapes_are_named(tmp_path: Path) -> None:
    text = refused(tiny(in_chans=1), weights(tiny()), tmp_path / "w.safetensors")
    assert "conv_stem.weight: (16, 3, 3, 3) in the file, (16, 1, 3, 3) in the model" in text
    assert "--num-classes" not in text


def test_another_head_gets_a_hint_and_can_be_left_out(tmp_path: Path, donor: nn.Module) -> None:
    model = create_model(TINY, num_classes=5)
    text = refused(model, weights(donor), tmp_path / "w.safetensors")
    assert "classifier.weight: (3, 1024) in the file, (5, 1024) in the model" in text
    assert "--num-classes 3" in text
    head = model.classifier.weight.clone()
    load_checkpoint(model, tmp_path / "w.safetensors", new_head=True)
    assert torch.equal(model.classifier.weight, head)
    assert torch.equal(model.conv_stem.weight, donor.conv_stem.weight)
    bare = create_model(TINY, num_classes=0, pretrained=True, checkpoint=tmp_path / "w.safetensors")
    assert torch.equal(bare.conv_stem.weight, donor.conv_stem.weight)


@pytest.mark.parametrize(("cut", "shape"), [(slice(None), "16, 1"), (slice(8), "8, 3")])
def test_new_head_excuses_nothing_but_the_head(tmp_path: Path, donor: nn.Module, cut: slice, shape: str) -> None:
    state = weights(donor)
    state["conv_stem.weight"] = state["conv_stem.weight"][cut, : int(shape[-1])].contiguous()
    save_file(state, tmp_path / "w.safetensors")
    model = create_model(TINY, num_classes=5)
    before = weights(model)
    with pytest.raises(ModelError, match=rf"conv_stem\.weight: \({shape}, 3, 3\) in the file"):
        load_checkpoint(model, tmp_path / "w.safetensors", new_head=True)
    assert same(weights(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, donor: nn.Module, value: float) -> None:
    state = weights(donor)
    state["bn1.running_var"][3] = value
    assert "bn1.running_var holds values that are not finite" in refused(tiny(), state, tmp_path / "w.safetensors")


def test_meta_models_take_no_checkpoint(tmp_path: Path, donor: nn.Module) -> None:
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="meta device"):
        load_checkpoint(tiny(device="meta"), tmp_path / "w.safetensors")


def test_timms_own_conversion_is_used(tmp_path: Path) -> None:
    small = {"depth": 1, "embed_dim": 12, "num_heads": 2, "num_classes": 3}
    torch.manual_seed(2)
    donor = create_model("vit_tiny_patch16_224", **small)
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    model = create_model("vit_tiny_patch16_224", img_size=96, checkpoint=tmp_path / "w.safetensors", **small)
    assert model.pos_embed.shape == (1, 37, 12)
    assert torch.equal(model.blocks[0].attn.qkv.weight, donor.blocks[0].attn.qkv.weight)


def test_torchvisions_old_densenet_names(tmp_path: Path) -> None:
    small = {"block_config": (1, 1), "growth_rate": 4, "num_init_features": 8, "bn_size": 2, "num_classes": 3}
    torch.manual_seed(3)
    donor = torchvision.models.DenseNet(**small)
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
        for key, value in weights(donor).items()
        if not key.endswith("num_batches_tracked")
    }
    assert old.keys() != donor.state_dict().keys()
    torch.save(old, tmp_path / "w.pth")
    torch.manual_seed(4)
    model = torchvision.models.DenseNet(**small)
    load_checkpoint(model, tmp_path / "w.pth")
    assert same(weights(model), weights(donor))


# Input sizes


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("resnet18", {}, (3, 224, 224)),
        ("resnet18", {"in_chans": 1}, (1, 224, 224)),
        ("resnet18", {"img_size": 32, "in_chans": 1}, (1, 32, 32)),
        ("resnet18", {"img_size": (8, 16)}, (3, 8, 16)),
        ("inception_v3", {}, (3, 299, 299)),
        ("tresnet_m", {}, (3, 224, 224)),
        ("tresnet_m", {"in_chans": 1}, (1, 224, 224)),
        ("vit_tiny_patch16_224", {}, (3, 224, 224)),
        ("vit_tiny_patch16_224", {"img_size": (64, 96)}, (3, 64, 96)),
        ("vit_tiny_patch16_384", {}, (3, 384, 384)),
        ("torchvision/inception_v3", {}, (3, 299, 299)),
        ("torchvision/efficientnet_b1", {}, (3, 240, 240)),
        ("torchvision/vit_b_16", {"img_size": 64}, (3, 64, 64)),
        ("torchvision/resnet18", {"img_size": 32}, (3, 32, 32)),
        ("torchvision/fcn_resnet50", {}, (3, 520, 520)),
    ],
)
def test_input_size(name: str, kwargs: dict[str, Any], size: tuple[int, int, int]) -> None:
    model = create_model(name, device="meta", **kwargs)
    assert input_size(model) == size
    base = model._convsurgery_base
    assert input_size(create_model(base.name, device="meta", **base.kwargs)) == size
    assert input_size(copy.deepcopy(model)) == size


def test_input_size_of_plain_models() -> None:
    with torch.device("meta"):
        assert input_size(torchvision.models.inception_v3(init_weights=False)) == (3, 299, 299)
        assert input_size(torchvision.models.efficientnet_b1()) == (3, 240, 240)
        assert input_size(timm.create_model("vit_tiny_patch16_224", img_size=96)) == (3, 96, 96)
        assert input_size(nn.Sequential(nn.Conv2d(5, 2, 1))) == (5, 224, 224)
        assert input_size(nn.ReLU()) == (3, 224, 224)


def test_input_size_without_the_channels_timm_notes() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18", in_chans=2)
        stem = timm.create_model("tresnet_m")
    for one in (model, stem):
        vars(one).pop("in_chans", None)
        vars(one).pop("_traits", None)
    assert input_size(model) == (2, 224, 224)
    # Its first convolution sees 48 channels: 4x4 pixels of 3.
    assert stem.get_submodule(stem.pretrained_cfg["first_conv"]).in_channels == 48
    assert input_size(stem) == (3, 224, 224)


# Telling what a model was built from


def plain(name: str, **kwargs: Any) -> nn.Module:
    """As a user builds it; without timm's own notes, which older versions do not write."""
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    vars(model).pop("_model_args", None)
    return model


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 10}, {"in_chans": 1}, {"num_classes": 4, "in_chans": 2}])
@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("resnet18", "resnet18.a1_in1k"),
        (TINY, f"{TINY}.lamb_in1k"),
        ("convnext_atto", "convnext_atto.d2_in1k"),
        ("resnet18.tv_in1k", "resnet18.tv_in1k"),
    ],
)
def test_identify_timm(name: str, full: str, kwargs: dict[str, Any]) -> None:
    assert identify(plain(name, **kwargs)) == Base(full, kwargs)


def test_identify_timm_by_other_marks() -> None:
    name = "vit_tiny_patch16_224"
    full = f"{name}.augreg_in21k_ft_in1k"
    assert identify(plain(name, img_size=96)) == Base(full, {"img_size": (96, 96)})
    assert identify(plain(name, global_pool="avg")) is not None
    with torch.device("meta"):
        silu = timm.create_model("resnet18", act_layer="silu")
        features = timm.create_model("resnet18", features_only=True, out_indices=(1, 2))
        reset = timm.create_model("resnet18")
        reset.reset_classifier(6)
        by_hand = timm.create_model("resnet18")
        by_hand.fc = nn.Linear(512, 6)
    assert identify(silu) == Base("resnet18.a1_in1k", {"act_layer": "silu"})
    assert identify(features) == Base("resnet18.a1_in1k", {"features_only": True, "out_indices": [1, 2]})
    assert identify(reset) == Base("resnet18.a1_in1k", {"num_classes": 6})
    assert identify(by_hand) == Base("resnet18.a1_in1k", {"num_classes": 6})


def test_identify_trained_and_run() -> None:
    model = timm.create_model(TINY, num_classes=3).train()
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert identify(model.double()) == Base(f"{TINY}.lamb_in1k", {"num_classes": 3})


def test_identify_refuses_what_would_not_rebuild() -> None:
    assert identify(plain("resnet18", act_layer=nn.SiLU)) is None
    with torch.device("meta"):
        assert identify(timm.create_model("resnet18", act_layer=nn.SiLU)) is None
        changed = timm.create_model("resnet18")
        changed.layer1[0].conv1 = nn.Conv2d(64, 64, 3, padding=2, dilation=2, bias=False)
        longer = timm.create_model("resnet18")
        longer.layer1.append(nn.Identity())
        option = torchvision.models.shufflenet_v2_x1_0()
        option.stage2[0].branch2[0].padding_mode = "reflect"
        scaled = timm.create_model("vit_tiny_patch16_224")
        scaled.blocks[0].attn.scale *= 2
        positions = timm.create_model("vit_tiny_patch16_224")
        positions.pos_embed = nn.Parameter(torch.zeros(1, 10, 192))
    assert identify(changed) is None
    assert identify(longer) is None
    assert identify(option) is None
    assert identify(scaled) is None
    assert identify(positions) is None


def test_identify_reads_options_that_only_the_repr_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden(nn.ReLU):
        def extra_repr(self) -> str:
            return f"k={self._k}"

    with torch.device("meta"):
        built = [timm.create_model("resnet18", act_layer=Hidden) for _ in range(3)]
    for model, k in zip(built, (1, 1, 2), strict=True):
        for module in model.modules():
            if isinstance(module, Hidden):
                module._k = k
        vars(model).pop("_model_args", None)
    monkeypatch.setattr("convsurgery.zoo.build.create_model", lambda *args, **kwargs: built[0])
    assert identify(built[1]) == Base("resnet18.a1_in1k")
    assert identify(built[2]) is None


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


def test_identify_refuses_other_classes() -> None:
    own = Own()
    assert identify(own) is None
    own.pretrained_cfg = {"architecture": "resnet18", "input_size": (3, 224, 224), "num_classes": 1000}
    assert identify(own) is None
    own.pretrained_cfg = {"architecture": "no_such_model"}
    assert identify(own) is None

    class Derived(torchvision.models.ResNet):
        pass

    with torch.device("meta"):
        assert identify(Derived(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])) is None
        assert identify(nn.Conv2d(3, 4, 3)) is None


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 10}])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b1", "squeezenet1_1"])
def test_identify_torchvision(name: str, kwargs: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **kwargs)
    assert identify(model) == Base(f"torchvision/{name}", kwargs)


def test_identify_torchvision_by_other_marks() -> None:
    with torch.device("meta"):
        inception = torchvision.models.inception_v3(transform_input=True, init_weights=False)
        auxiliary = torchvision.models.googlenet(init_weights=False)
        google = torchvision.models.googlenet(aux_logits=False, transform_input=True, init_weights=False)
        vit = torchvision.models.vit_b_32(image_size=64)
        segment = torchvision.models.segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, aux_loss=True, num_classes=4
        )
    assert identify(inception) == Base("torchvision/inception_v3", {"transform_input": True})
    assert identify(auxiliary) == Base("torchvision/googlenet")
    assert identify(google) == Base("torchvision/googlenet", {"aux_logits": False, "transform_input": True})
    assert identify(vit) == Base("torchvision/vit_b_32", {"image_size": 64})
    assert identify(segment) == Base("torchvision/fcn_resnet50", {"num_classes": 4, "aux_loss": True})


def test_identify_looks_past_ignored_modules() -> None:
    for model in (plain("resnet18", num_classes=5), torchvision.models.resnet18(num_classes=5)):
        model.layer1[0].conv1 = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 9, padding=4))
        assert identify(model) is None
        assert identify(model, ignore=["layer1.0.conv2"]) is None
        found = identify(model, ignore=["layer1.0.conv1"])
        assert found is not None
        assert found.kwargs == {"num_classes": 5}
        # A prefix of a name is not the module of that name.
        assert identify(model, ignore=["layer1.0.conv"]) is None


def test_an_attached_base_is_trusted() -> None:
    model = create_model("resnet18", num_classes=5, device="meta")
    model.layer1[0].conv1 = nn.Identity()
    assert identify(model) == Base("resnet18", {"num_classes": 5})


def test_local_hub_folder_is_rebuilt_without_it(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    trained = timm.create_model(TINY, num_classes=3, in_chans=1)
    trained.pretrained_cfg["mean"] = (0.125, 0.125, 0.125)
    save_for_hf(trained, tmp_path / "hub", model_args={"in_chans": 1})
    model = create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert same(weights(model), weights(trained))
    base = model._convsurgery_base
    assert base.name.startswith(TINY)
    (tmp_path / "hub").rename(tmp_path / "moved")
    again = create_model(base.name, device="meta", **Base.from_json(json.loads(json.dumps(base.to_json()))).kwargs)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    # How it wants its images comes back with a saved folder; where its weights came from does not.
    set_preprocessing(again, json.loads(json.dumps(preprocessing(model))), "preprocessing")
    assert again.pretrained_cfg["mean"][0] == 0.125
    assert "file" not in again.pretrained_cfg
    assert input_size(again) == input_size(model) == (1, 224, 224)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"num_classes": 0, "global_pool": "", "drop_path_rate": 0.1, "act_layer": "gelu"}),
        ("regnety_004", {"se_ratio": 0.5}),
        ("naflexvit_base_patch16_gap", {"depth": 1}),
        ("scaled_resnet18", {"width": 8, "in_chans": 1}),
        ("rdnet_a", {"step": "explicit"}),
        ("resnet18", {"features_only": True, "out_indices": [1, 2]}),
        ("swin_tiny_patch4_window7_224", {"img_size": 112, "window_size": 7}),
        ("vit_tiny_patch16_224", {"weight_init": "skip", "reg_tokens": 2}),
        ("torchvision/mobilenet_v3_small", {"dilated": True, "reduced_tail": True}),
        ("torchvision/mobilenet_v2", {"width_mult": 0.5, "dropout": 0.4}),
        ("torchvision/fasterrcnn_resnet50_fpn", {"num_classes": 3, "min_size": 300, "image_mean": [0.5, 0.5, 0.5]}),
        ("torchvision/vit_b_16", {"image_size": 64}),
    ],
)
def test_architecture_arguments_are_a_base(name: str, kwargs: dict[str, Any]) -> None:
    import convsurgery.models as models  # noqa: F401

    model = create_model(name, device="meta", **kwargs)
    assert model._convsurgery_base == Base(name, kwargs)


def test_settings_of_the_caller_leave_the_base_alone() -> None:
    model = timm.create_model("resnet18", pretrained_cfg_overlay={"num_classes": 7, "mean": (0.0, 0.0, 0.0)})
    assert identify(model) == Base("resnet18.a1_in1k", {"num_classes": 7})


@pytest.mark.parametrize("key", ["pretrained", "pretrained_cfg", "cache_dir", "checkpoint_path", "weights", "device"])
def test_what_is_no_architecture_is_no_base(key: str) -> None:
    for name in ("resnet18", "torchvision/resnet18"):
        with pytest.raises(ModelError, match=rf"base\.kwargs\.{key} is nothing that a saved model holds"):
            Base(name, {key: 1})
