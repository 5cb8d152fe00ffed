"""What observing a model finds where that is hard: detection, flow, hidden, scripted, checkpointed, without weights."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import timm
import torch
from conftest import ShapeFlowNet, SharedNet
from timm.models import create_feature_extractor as timm_extractor
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor

import convsurgery as cs
from convsurgery import zoo
from convsurgery.errors import ModelError, NoMatchError
from convsurgery.operators.kervolution import Kervolution2d


def calls(model: nn.Module, *inputs: object) -> list[str]:
    """Names of the convolutions a real forward calls, in order, counted by hooks of our own."""
    found: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: found.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model.eval()(*inputs)
    for hook in hooks:
        hook.remove()
    return found


DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"box_score_thresh": 0.0},
    "maskrcnn_resnet50_fpn": {"box_score_thresh": 0.0, "box_detections_per_img": 3},
    "keypointrcnn_resnet50_fpn": {"box_score_thresh": 0.0, "box_detections_per_img": 3},
    "retinanet_resnet50_fpn_v2": {"score_thresh": 0.0},
    "fcos_resnet50_fpn": {"score_thresh": 0.0},
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0},
}


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_are_seen_as_they_run_and_stay_what_they_are(name: str) -> None:
    sizes = {} if "ssd" in name else {"min_size": 96, "max_size": 128}
    model = zoo.create_model(f"torchvision/{name}", num_classes=3, **sizes, **DETECTORS[name])
    images = [torch.rand(3, 90, 100), torch.rand(3, 64, 64)]
    plan = cs.plan(model, "all-conv->conv", example_inputs=(images,))
    assert [e.site.name for e in plan.entries if e.site.index >= 0] == list(dict.fromkeys(calls(model, images)))
    new = cs.apply(model, plan)
    assert type(new) is type(model)
    with torch.no_grad():
        for before, after in zip(model(images), new(images), strict=True):
            assert before["boxes"].numel() > 0
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_detector_is_planned_by_name_without_weights_as_with_them() -> None:
    name = "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn"
    by_name = cs.plan(name, "first-conv->conv; last-conv->conv")
    assert by_name.input_shapes == ((3, 320, 320),)
    real = cs.plan(zoo.create_model(name), "first-conv->conv; last-conv->conv")
    sites = [[(e.site.names, e.site.geometry, e.site.calls) for e in plan.entries] for plan in (by_name, real)]
    assert sites[0] == sites[1]
    assert by_name.seen == "hooks, and FX in 6 parts (the whole: Proxy object cannot be iterated)"


def test_batch_norms_are_followed_inside_the_parts_that_trace() -> None:
    plan = cs.plan("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", "all-conv->kerv-poly")
    assert plan.edits[0].site.batchnorm == "backbone.body.0.1"


def test_positions_count_every_call_at_its_own_size() -> None:
    plan = cs.plan(
        "torchvision/retinanet_resnet50_fpn", "last-conv->conv", example_inputs=([torch.zeros(3, 800, 800)],)
    )
    (head,) = [e.site for e in plan.entries if e.site.name == "head.regression_head.bbox_reg"]
    assert head.calls == 5
    assert head.positions == 100**2 + 50**2 + 25**2 + 13**2 + 7**2
    assert head.cost.macs == head.positions * 256 * 9 * 36


def test_optical_flow_takes_two_images() -> None:
    model = zoo.create_model("torchvision/raft_small")
    pair = (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    plan = cs.plan(model, "all-conv->conv", example_inputs=pair)
    assert [e.site.name for e in plan.entries] == list(dict.fromkeys(calls(model, *pair)))
    new = cs.apply(model, plan)
    with torch.no_grad():
        assert all(map(torch.equal, model(*pair), new(*pair)))
    assert cs.plan("torchvision/raft_small", "first-conv->conv").input_shapes == ((1, 3, 520, 960),) * 2


def test_a_model_without_conv2d_is_not_run() -> None:
    with pytest.raises(NoMatchError, match="the model has no Conv2d"):
        cs.plan("torchvision/r3d_18", "all-conv->conv")


@pytest.mark.parametrize("name", ["vgg11", "efficientvit_b0", "nfnet_l0", "xcit_nano_12_p8_224", "edgenext_xx_small"])
def test_convolutions_hidden_in_leaves_are_seen(name: str) -> None:
    model = zoo.create_model(name)
    image = zoo.example_inputs(model)
    plan = cs.plan(model, "all-conv->conv")
    assert [e.site.name for e in plan.entries if e.site.index >= 0] == list(dict.fromkeys(calls(model, *image)))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "densenet121"])
def test_checkpointed_blocks_are_seen_and_kept(name: str) -> None:
    model = timm.create_model(name, **({"memory_efficient": True} if name == "densenet121" else {})).eval()
    if name != "densenet121":
        model.set_grad_checkpointing(True)
    image = torch.randn(1, 3, 64, 64)
    new = cs.convert(model, "all-conv->kerv-linear")
    assert sum(isinstance(m, Kervolution2d) for m in new.modules()) == len(calls(model, image))
    assert torch.equal(new(image), model(image))
    new.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in new.parameters())


# --- TorchScript


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def test_a_scripted_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"compiled by torch.jit.script or torch.jit.trace.*convert the Python model"):
        cs.plan(scripted(nn.Sequential(nn.Conv2d(3, 4, 3))), "all-conv->conv")


def test_convolutions_inside_a_scripted_part_are_listed_and_stay() -> None:
    model = timm.create_model("resnet18").eval()
    model.layer1 = scripted(model.layer1)
    image = torch.randn(1, 3, 64, 64)
    plan = cs.plan(model, "all-conv->kerv-linear", example_inputs=image)
    assert (len(plan.edits), len(plan.skips)) == (16, 4)
    assert [e.site.index for e in plan.entries] == list(range(20))
    assert {e.reason for e in plan.skips} == {
        "inside a module compiled by torch.jit.script; convert the Python module, then compile it"
    }
    assert torch.equal(cs.apply(model, plan)(image), model(image))


# --- value-dependent control flow, with and without weights


class EarlyExit(nn.Module):
    """How far it goes depends on what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y if float(y.mean()) > 0 else self.second(y)


@pytest.mark.parametrize(("bias", "reached"), [(9.0, ["first"]), (-9.0, ["first", "second"])])
def test_control_flow_on_values_follows_the_weights(bias: float, reached: list[str]) -> None:
    model = EarlyExit()
    nn.init.constant_(model.first.bias, bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = cs.plan(model, "all-conv->conv", example_inputs=torch.zeros(1, 3, 8, 8))
    assert [e.site.name for e in plan.entries if e.site.index >= 0] == reached
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_control_flow_on_values_without_weights_follows_zeros() -> None:
    with torch.device("meta"):
        model = EarlyExit()
    plan = cs.plan(model, "all-conv->conv", example_inputs=torch.zeros(1, 3, 8, 8))
    assert [e.site.index for e in plan.entries] == [0, 1]
    assert all(p.is_meta for p in model.parameters())


# --- inputs that do not fit


class TwoImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return self.conv(left) + scale * self.conv(right)


def test_missing_inputs_are_named() -> None:
    with pytest.raises(ModelError, match=r"its forward takes left, right: pass example_inputs=\(left, right\)"):
        cs.plan(TwoImages(), "all-conv->conv")
    image = torch.zeros(1, 3, 8, 8)
    assert cs.plan(TwoImages(), "all-conv->conv", example_inputs=(image, image)).edits[0].site.calls == 2
    raft = zoo.create_model("torchvision/raft_small", device="meta")
    with pytest.raises(ModelError, match=r"its forward takes image1, image2: pass example_inputs=\(image1, image2\)"):
        cs.plan(raft, "all-conv->conv", example_inputs=image)


def test_detectors_say_that_they_take_a_list() -> None:
    model = zoo.create_model("torchvision/ssdlite320_mobilenet_v3_large", device="meta")
    with pytest.raises(ModelError, match=r"take a list of images: pass example_inputs=\(\[image, ...\],\)"):
        cs.plan(model, "all-conv->conv", example_inputs=(torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)))


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [
        ("botnet26t_256", 64, "the smallest image it takes is 224x224"),
        ("vit_tiny_patch16_224", 64, "it was built for 224x224 images; create it with img_size="),
        ("inception_v3", 32, "inputs of shape 1x3x32x32: Calculated padded input size"),
    ],
)
def test_an_image_too_small_is_told_what_is_legal(name: str, size: int, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        cs.plan(zoo.create_model(name, device="meta"), "all-conv->conv", example_inputs=torch.zeros(1, 3, size, size))


def test_fakes_that_fail_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ModelError):
        cs.plan(
            zoo.create_model("hrnet_w18_small", device="meta"), "all-conv->conv", example_inputs=torch.zeros(1, 3, 9, 9)
        )
    cs.plan("torchvision/ssdlite320_mobilenet_v3_large", "first-conv->conv")
    assert not caplog.records


# --- what other tools do with a converted model


@pytest.mark.parametrize("rule", ["all-conv->conv", "all-conv->kerv-linear", "residual->block"])
@pytest.mark.parametrize(
    "name", ["resnet18", "tf_efficientnet_b0", "hrnet_w18_small", "regnety_002", "efficientvit_b0"]
)
def test_features_only_models(name: str, rule: str) -> None:
    model = timm.create_model(name, features_only=True).eval()
    new, image = cs.convert(model, rule), torch.randn(1, 3, 64, 64)
    assert type(new) is type(model)
    assert new.feature_info.channels() == model.feature_info.channels()
    assert all(map(torch.equal, model(image), new(image)))


@pytest.mark.parametrize("rule", ["all-conv->kerv-poly", "all-conv->kerv-sigmoid", "residual->block", "conv-bn->fused"])
@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_b0"])
def test_feature_extraction_and_tracing_of_converted_models(name: str, rule: str) -> None:
    new, image = cs.convert(timm.create_model(name).eval(), rule), torch.randn(1, 3, 32, 32)
    node = "layer2" if name == "resnet18" else "blocks.2"
    wanted = new.forward_intermediates(image, indices=[2], intermediates_only=True)[0]
    features = timm_extractor(new, {node: "out"})
    assert torch.equal(features(image)["out"], wanted)
    if name == "resnet18" or rule != "residual->block":  # without timm's leaf rules its own SAME padding fails
        assert torch.equal(torchvision_extractor(new, {node: "out"})(image)["out"], wanted)
        assert torch.equal(fx.symbolic_trace(new)(image), new(image))
    inside = [type(module) for module in features.modules()]
    assert any(issubclass(kind, Kervolution2d) for kind in inside) == ("kerv" in rule)


def test_operators_are_leaves_to_timm() -> None:
    from timm.models import get_graph_node_names

    new = cs.convert(timm.create_model("tf_efficientnet_b0").eval(), "first-conv->kerv-gauss")
    names, _ = get_graph_node_names(new)
    assert "conv_stem" in names
    assert not any(name.startswith("conv_stem.") for name in names)


def test_a_graph_module_can_be_converted_and_traced_again() -> None:
    model = fx.symbolic_trace(timm.create_model("resnet18").eval())
    image = torch.randn(1, 3, 32, 32)
    new = cs.convert(model, "conv-bn->kerv-linear", example_inputs=image)
    assert torch.equal(new(image), model(image))
    poly = fx.symbolic_trace(cs.convert(timm.create_model("resnet18"), "first-conv->kerv-poly"))
    again = cs.convert(poly, "conv[k=1]->conv", example_inputs=image)
    assert len(cs.record(again).edits) == 3


def test_converted_parts_stay_whole_in_plans(image: Tensor) -> None:
    new = cs.convert(SharedNet(), "first-conv->kerv-linear", example_inputs=image)
    assert cs.plan(new, "all-conv->conv", example_inputs=image).seen == "FX and hooks"
    assert cs.plan(ShapeFlowNet(), "all-conv->conv", example_inputs=image).seen.startswith("hooks alone (FX: ")


def test_planning_billions_of_parameters_takes_little_memory() -> None:
    code = (
        "import re, convsurgery as cs\n"
        "plan = cs.plan('vit_7b_patch16_dinov3', 'all-conv->conv')\n"
        "assert plan.total_params > 6.7e9\n"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5e6  # kB
