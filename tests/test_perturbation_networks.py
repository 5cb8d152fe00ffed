"""The perturbation paper's networks by rule, and what fitting does to whole models."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.adapt import load_data
from convsurgery.errors import ConversionError, DataError, ExportError
from convsurgery.models import ScaledResNet
from convsurgery.operators.perturbation import Perturbation2d
from convsurgery.recipes import read_recipe

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


# Parameter counts.


@pytest.mark.parametrize(
    ("masks", "ratio"),
    [(160, "1.3"), (128, "2.0"), (96, "3.5"), (64, "7.9"), (32, "31.0"), (16, "120.1"), (8, "451.1")],
)
def test_parameter_ratios_of_table_5(masks: int, ratio: str) -> None:
    """Of ResNet-18 to the recipe's network; the paper's "masks" are the width of the first stage."""
    recipe = read_recipe(RECIPES / "pnn_resnet18_cifar.yaml", [f"model.kwargs.width={masks}"])
    model = cs.create_model(
        recipe.model.name, num_classes=recipe.model.num_classes, img_size=32, device="meta", **recipe.model.kwargs
    )
    made = cs.plan(model, recipe.convert.rule, start=recipe.convert.start)
    planned = made.total_params + made.after.params - made.before.params
    resnet = sum(p.numel() for p in timm.create_model("resnet18", num_classes=10).parameters())
    assert f"{resnet / planned:.1f}" == ratio
    if masks <= 32:  # and the plan counts what is built
        built = cs.create_model(recipe.model.name, num_classes=10, img_size=32, **recipe.model.kwargs)
        new = cs.convert(built, recipe.convert.rule, start=recipe.convert.start)
        assert sum(p.numel() for p in new.parameters()) == planned


@pytest.mark.parametrize("depth", [18, 50])
def test_scaled_resnet_of_64_is_timms(depth: int) -> None:
    ours, theirs = (timm.create_model(f"{prefix}resnet{depth}", num_classes=5).eval() for prefix in ("scaled_", ""))
    assert type(ours) is ScaledResNet
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    features = timm.create_model(f"scaled_resnet{depth}", width=8, features_only=True)
    assert [f.shape[1] for f in features(x)] == features.feature_info.channels()


def test_scaled_resnet_refuses_a_width_that_is_none() -> None:
    with pytest.raises(ValueError, match="width must be a positive integer, not 0"):
        timm.create_model("scaled_resnet18", width=0)


# By rule: VGG-16, Faster R-CNN.


def test_pnn_vgg16(tmp_path: Path) -> None:
    """All of its convolutions but the first; forward, backward, export."""
    features = cs.create_model("torchvision/vgg16").features
    x = torch.randn(2, 3, 32, 32)
    new = cs.convert(features, "conv[index=1..99]->pnn", example_inputs=x)
    layers = [m for m in new.modules() if isinstance(m, Perturbation2d)]
    assert len(layers) == 12
    assert isinstance(new[0], nn.Conv2d)
    out = new.train()(x)
    assert out.shape == features(x).shape
    out.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in new.parameters())
    parity = cs.export_onnx(new, tmp_path / "vgg.onnx", example_inputs=x)
    assert parity is not None


def test_faster_rcnn_with_a_pnn_resnet50(tmp_path: Path) -> None:
    model = cs.create_model("torchvision/fasterrcnn_resnet50_fpn", weights_backbone=None, min_size=64, max_size=96)
    new = cs.convert(model, "conv[in=Bottleneck, k=3]->pnn")
    assert sum(isinstance(m, Perturbation2d) for m in new.modules()) == 16
    assert type(new) is type(model)
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 50.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([3])} for _ in images]
    losses = new.train()(images, targets)
    sum(losses.values()).backward()
    # torchvision freezes the stem and the first stage of a backbone only when it has weights
    found = [m.weight.grad for m in new.modules() if isinstance(m, Perturbation2d)]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in found)
    with torch.no_grad():
        answers = new.eval()(images)
    assert {"boxes", "labels", "scores"} <= set(answers[0])
    with pytest.raises(ExportError, match=r"detection models are not exported.*model\.backbone"):
        cs.export_onnx(new, tmp_path / "rcnn.onnx")
    backbone = new.backbone.body.eval()
    cs.export_onnx(Stages(backbone), tmp_path / "backbone.onnx", example_inputs=torch.rand(2, 3, 64, 96))


class Stages(nn.Module):
    """The last of a backbone's maps."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return list(self.body(x).values())[-1]


# Whole models: plans, starts, fits.


@cache
def _trained() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = cs.create_model("scaled_resnet18", num_classes=10, img_size=32, in_chans=1, width=8)
    data = load_data("digits", model=model, batch_size=64)
    cs.finetune(model, data, epochs=4, lr=1e-2, warmup_epochs=0, progress=False)
    images = torch.cat([images for images, _ in data.val])
    return model.eval(), images[:256]


def trained() -> tuple[nn.Module, Tensor]:
    """A small network trained on digits, and 256 held-out images."""
    model, images = _trained()
    return copy.deepcopy(model), images


def test_plan_says_what_falls_away() -> None:
    text = str(cs.plan("scaled_resnet18", "conv[in=BasicBlock]->pnn"))
    flat = " ".join(text.split())
    assert "pnn by project loses the predictions until it is trained" in flat
    assert "pnn by neutral computes what the convolution did" in flat
    assert "its gain goes" not in flat
    assert "pnn sees pixels, not windows: 3x3 falls away (at 13 sites)" in flat
    assert "3x3 falls away, stride becomes max pooling (at 3 sites)" in flat
    net = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2))
    dilated = cs.plan(net, "all-conv->pnn", example_inputs=torch.rand(1, 3, 9, 9))
    assert dilated.notes == ("pnn sees pixels, not windows: 3x3 and the dilation fall away (at 1 site)",)
    fitted = cs.plan("scaled_resnet18", "conv[in=BasicBlock]->pnn", start="fit")
    assert "pnn by fit comes as near to what the convolution did as the data allow" in " ".join(str(fitted).split())
    assert cs.Plan.from_json(fitted.to_json()) == fitted


def test_fit_without_data_names_the_starts_that_need_none() -> None:
    model = cs.create_model("scaled_resnet18", width=4, img_size=32)
    with pytest.raises(
        ConversionError, match=r"layer1.0.conv1: pnn starts by fit, which needs images: give calib.*"
    ) as e:
        cs.convert(model, "conv[in=BasicBlock]->pnn", start="fit")
    assert str(e.value).endswith("Without data it starts by project or random or blend")
    with pytest.raises(ConversionError, match=r"Without data it starts by neutral or project or random or blend$"):
        cs.convert(model, "pointwise->pnn", start="fit")
    with pytest.raises(DataError, match="the calibration data is empty"):
        cs.convert(model, "pointwise->pnn", calibration=[])


def test_neutral_start_is_only_for_pointwise_convolutions() -> None:
    made = cs.plan("scaled_resnet18", "conv[in=BasicBlock]->pnn", start="neutral")
    assert len(made.edits) == 3
    assert all("only a 1x1 convolution can be kept" in str(entry.reason) for entry in made.skips)
    assert len(made.skips) == 16
    with pytest.raises(cs.ConvSurgeryError, match="without an eps"):
        cs.convert(nn.Conv2d(3, 4, 1), "all-conv->pnn", start="neutral(0.1)", example_inputs=torch.rand(1, 3, 4, 4))


def test_pointwise_convolutions_keep_every_prediction() -> None:
    model = cs.create_model("mobilenetv3_small_050", num_classes=7, img_size=64)
    x = torch.randn(4, 3, 64, 64)
    new = cs.convert(model, "pointwise[groups=1]->pnn")
    replaced = [m for m in new.modules() if isinstance(m, Perturbation2d)]
    assert len(replaced) > 20
    torch.testing.assert_close(new(x), model(x), rtol=1e-6, atol=1e-7)
    fitted = cs.convert(model, "pointwise[groups=1]->pnn", calibration=x)
    torch.testing.assert_close(fitted(x), model(x), rtol=1e-6, atol=1e-7)
    # near its kink, other images are clipped
    assert not torch.allclose(fitted(3 * x), model(3 * x), rtol=1e-4)


def test_fit_is_nearer_than_the_projection_and_that_than_chance() -> None:
    model, x = trained()
    rule, wanted = "conv[in=BasicBlock, k=3]->pnn(fanout=2)", model(x).detach()
    errors = []
    for options in ({"calibration": x}, {"start": "project"}, {"start": "random"}):
        out = cs.convert(model, rule, **options)(x).detach()
        kept = (out.argmax(1) == wanted.argmax(1)).float().mean()
        errors.append((float((out - wanted).norm() / (wanted - wanted.mean(0)).norm()), float(kept)))
    (fitted, kept), (projected, _), (drawn, lost) = errors
    assert fitted < 0.8 * projected < 0.8 * drawn
    assert kept > 0.75
    assert lost < 0.3


@pytest.mark.parametrize("rule", ["conv[in=BasicBlock]->pnn", "conv[in=BasicBlock]->lbc(filters=32)"])
def test_calibrate_gives_the_same_again(rule: str) -> None:
    """Nothing adds up when it is called twice, the shifts of running means neither; the order is that of execution."""
    model, x = trained()
    seen: list[str] = []
    new = cs.convert(model, rule, calibration=x, on_layer=lambda layer: seen.append(layer.name))
    names = [entry.site.name for entry in cs.record(new).edits]
    assert seen == names
    state = copy.deepcopy(new.state_dict())
    errors = cs.calibrate(new, x, teacher=model)
    assert list(errors) == names
    again = cs.calibrate(new, [(x[:100], None), (x[100:], None)], teacher=model)
    for key, value in new.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=2e-3, atol=2e-3)
    assert all(abs(errors[name] - again[name]) < 1e-3 for name in names)
    assert not torch.equal(new.bn1.running_mean, torch.zeros(8))


def test_shift_goes_into_the_running_mean() -> None:
    model, x = trained()
    rule = "conv[in=BasicBlock, k=3, index=1]->lbc(filters=64)"
    new = cs.convert(model, rule, calibration=x)
    moved = [n for n, b in model.named_buffers() if "running_mean" in n and not torch.equal(b, new.get_buffer(n))]
    assert moved == ["layer1.0.bn1.running_mean"]
    assert torch.equal(model.layer1[0].bn1.running_var, new.layer1[0].bn1.running_var)
    outputs = []
    for net in (model, new):
        handle = net.layer1[0].bn1.register_forward_hook(lambda _, args, out: outputs.append(out.detach().clone()))
        net(x)
        handle.remove()
    means = [out.mean((0, 2, 3)) for out in outputs]
    torch.testing.assert_close(means[1], means[0], rtol=0, atol=1e-4)


def test_in_place_conversion_that_fails_on_its_data_changes_nothing() -> None:
    model, _ = trained()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=r"the model cannot run images of shape \(2, 5, 32, 32\)"):
        cs.convert_(model, "conv[in=BasicBlock]->pnn", calibration=torch.randn(2, 5, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(m, Perturbation2d) for m in model.modules())


def test_calibrate_wants_the_original_as_teacher() -> None:
    model, x = trained()
    new = cs.convert(model, "conv[in=BasicBlock]->pnn", calibration=x)
    with pytest.raises(ConversionError, match=r"the teacher has no convolution 'layer1.0.conv1'"):
        cs.calibrate(new, x, teacher=new)


@pytest.mark.parametrize(
    "rule",
    [
        "conv[in=BasicBlock]->pnn(fanout=2, noise=gaussian)",
        "conv[in=BasicBlock]->pnn(trainable=true, act=silu)",
        "conv[in=BasicBlock]->lbc",
    ],
)
def test_saved_fused_and_exported(rule: str, tmp_path: Path) -> None:
    model, x = trained()
    new = cs.convert(model, rule, calibration=x)
    wanted = new(x)
    cs.save(new, tmp_path / "saved")
    loaded = cs.load(tmp_path / "saved")
    assert torch.equal(loaded(x), wanted)
    fused = cs.fuse(new)
    # In float32 the network itself enlarges the rounding of the folded weights.
    exact = copy.deepcopy(new).double()
    torch.testing.assert_close(cs.fuse(exact)(x.double()), exact(x.double()), rtol=1e-9, atol=1e-9)
    cs.save(fused, tmp_path / "fused")
    assert torch.equal(cs.load(tmp_path / "fused")(x), fused(x))
    for inline in (False, True):
        cs.export_onnx(new, tmp_path / "model.onnx", inline=inline)


def test_same_padding_and_standardised_weights() -> None:
    """Subclasses of Conv2d: fits see what the operator sees, the padded image."""
    for name in ("tf_efficientnet_b0", "resnetv2_50x1_bit"):
        model = cs.create_model(name, num_classes=4, img_size=64)
        x = torch.randn(8, 3, 64, 64)
        rule = "conv[k=3, groups=1]->pnn" if "bit" in name else "depthwise[index=0..8]->pnn"
        new = cs.convert(model, rule, calibration=x)
        assert new(x).shape == model(x).shape
        assert torch.isfinite(new(x)).all()


def test_masks_of_one_layer_are_those_of_its_name() -> None:
    first, second = (
        cs.convert(cs.create_model("scaled_resnet18", width=4, img_size=32), "conv[in=BasicBlock]->pnn(seed=5)")
        for _ in range(2)
    )
    one, other = first.layer1[0].conv1.masks, first.layer1[0].conv2.masks
    assert torch.equal(one, second.layer1[0].conv1.masks)
    assert not torch.equal(one, other)


def test_layers_survive_another_image_size() -> None:
    model = cs.create_model("scaled_resnet18", width=4, img_size=32)
    new = cs.convert(model, "conv[in=BasicBlock]->pnn(fanout=2)")
    for size in (24, 40, 64):
        assert new(torch.randn(1, 3, size, size)).shape == (1, 1000)
    fixed = cs.convert(model, "conv[in=BasicBlock]->pnn(masks=fixed)")
    with pytest.raises(cs.ConvSurgeryError, match=r"fixed to maps of \(8, 8\) pixels, here are \(10, 10\)"):
        fixed(torch.randn(1, 3, 40, 40))
