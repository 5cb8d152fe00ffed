"""Reaction-diffusion steps by rule: where they stand, how they start, and what they are in ONNX."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import naive
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.adapt import load_data
from convsurgery.errors import ConversionError
from convsurgery.operators import bind
from convsurgery.operators.diffusion import ReactionDiffusion2d
from convsurgery.rules import parse_target

STEPS = ("rd-explicit", "rd-implicit", "rd-circulant")
steps = pytest.mark.parametrize("step", STEPS)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


# Where they stand.


@steps
@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet18", 5), ("resnet50", 12), ("torchvision/resnet18", 5), ("torchvision/resnet50", 12)]
)
def test_blocks_without_projection_are_replaced(step: str, name: str, blocks: int) -> None:
    made = cs.plan(name, f"residual->{step}(step=0.1)")
    assert len(made.edits) == blocks
    assert {str(entry.reason) for entry in made.skips} == {"its shortcut is projected: a step adds to its input itself"}
    assert cs.Plan.from_json(made.to_json()) == made
    params = made.total_params + made.after.params - made.before.params
    model = cs.create_model(name)
    new = cs.convert(model, f"residual->{step}(step=0.1)")
    assert sum(p.numel() for p in new.parameters()) == params
    assert sum(isinstance(m, ReactionDiffusion2d) for m in new.modules()) == blocks
    assert type(new) is type(model)
    new.train()(torch.randn(2, 3, 96, 96)).sum().backward()


def test_reasons() -> None:
    x = torch.randn(1, 3, 32, 32)
    made = cs.plan(timm.create_model("resnet18"), "residual->rd-implicit", example_inputs=x)
    assert "images of 2x2 pixels are smaller than the kernel, 3x3" in {str(entry.reason) for entry in made.skips}
    assert len(cs.plan(timm.create_model("resnet18"), "residual->rd-implicit(pad=1)", example_inputs=x).edits) == 5
    made = cs.plan("mobilenetv2_100", "residual->rd-explicit")
    assert made.edits
    with pytest.raises(cs.ConvSurgeryError, match="the adjoint needs an odd kernel, not 4"):
        bind(parse_target("rd-explicit(kernel=4)"))
    with pytest.raises(cs.ConvSurgeryError, match="step wants a number > 0, not 0"):
        bind(parse_target("rd-implicit(step=0)"))
    with pytest.raises(cs.ConvSurgeryError, match="rd-implicit has no argument 'boundary'"):
        bind(parse_target("rd-implicit(boundary=zeros)"))
    with pytest.raises(cs.ConvSurgeryError, match="takes the place of several layers"):
        cs.plan("resnet18", "first-conv->rd-explicit")


@steps
def test_in_place_of_one_convolution(step: str) -> None:
    model, x = timm.create_model("resnet18", num_classes=5).eval(), torch.randn(2, 3, 96, 96)
    rule = f"conv[k=3]->{step}(residual=false)"
    made = cs.plan(model, rule, example_inputs=x)
    assert len(made.edits) == 13
    assert all("keeps the number of channels" in str(entry.reason) for entry in made.skips)
    new = cs.convert(model, rule, example_inputs=x)
    assert not any(m.residual for m in new.modules() if isinstance(m, ReactionDiffusion2d))
    assert new(x).shape == (2, 5)
    planned = made.total_params + made.after.params - made.before.params
    assert sum(p.numel() for p in new.parameters()) == planned
    with pytest.raises(cs.ConvSurgeryError, match="takes the place of one convolution"):
        cs.plan(model, f"residual->{step}(residual=false)", example_inputs=x)


# Starts.


@cache
def _trained() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = cs.create_model("scaled_resnet18", num_classes=10, img_size=32, in_chans=1, width=8)
    data = load_data("digits", model=model, batch_size=64)
    cs.finetune(model, data, epochs=4, lr=1e-2, warmup_epochs=0, progress=False)
    train, val = (torch.cat([images for images, _ in loader]) for loader in (data.train, data.val))
    return model.eval(), train[:256], val


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    model, train, val = _trained()
    return copy.deepcopy(model), train, val


@steps
def test_fit_keeps_what_a_random_start_loses(step: str, tmp_path: Path) -> None:
    model, images, held_out = trained()
    answers = model(held_out).argmax(1)
    errors: dict[str, float] = {}
    before = copy.deepcopy(model.state_dict())
    rule = f"residual->{step}(step=0.5)"
    new = cs.convert(model, rule, calibration=images, on_layer=lambda layer: errors.update({layer.name: layer.after}))
    assert list(errors) == ["layer1.0.residual", "layer1.1.residual", "layer2.1.residual"]
    assert all(error < 0.15 for error in errors.values()), errors
    kept = [float((net(held_out).argmax(1) == answers).float().mean()) for net in (new, cs.convert(model, rule))]
    assert kept[0] > 0.93
    assert kept[0] > kept[1] + 0.1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = cs.convert(model, rule, calibration=images)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), new.state_dict().values(), strict=True))
    cs.save(new, tmp_path / "saved")
    assert torch.equal(cs.load(tmp_path / "saved")(held_out), new(held_out))


def test_errors_that_are_told_are_those_of_the_blocks() -> None:
    model, images, _ = trained()
    errors: dict[str, float] = {}
    new = cs.convert(
        model,
        "residual->rd-implicit(step=0.5)",
        calibration=images,
        on_layer=lambda layer: errors.update({layer.name: layer.after}),
    )
    outputs = []
    for net in (model, new):
        handle = net.layer1[0].act2.register_forward_pre_hook(lambda _, args: outputs.append(args[0].detach().clone()))
        net(images)
        handle.remove()
    wanted, got = outputs
    left = (got - wanted).square().mean((0, 2, 3)) / wanted.var((0, 2, 3), unbiased=False)
    assert float(left.mean().sqrt()) == pytest.approx(errors["layer1.0.residual"], rel=1e-3)


def test_fit_of_single_convolutions() -> None:
    model, images, _ = trained()
    rule = "conv[k=3, cin=cout, name=layer1.*]->rd-explicit(residual=false, step=1)"
    errors: dict[str, float] = {}
    new = cs.convert(model, rule, calibration=images, on_layer=lambda layer: errors.update({layer.name: layer.after}))
    assert len(errors) == 4
    assert all(error < 1 for error in errors.values())
    assert torch.isfinite(new(images)).all()


def test_spectrum_that_is_not_finite_names_its_layer() -> None:
    model, images, _ = trained()
    new = cs.convert(model, "residual->rd-implicit")
    new.layer1[1].residual.weight.data.fill_(float("nan"))
    with (
        torch.no_grad(),
        pytest.raises(cs.ConvSurgeryError, match=r"the spectrum of layer1\.1\.conv1 … layer1\.1\.bn2"),
    ):
        new(images[:2])


def test_fit_without_images_is_refused() -> None:
    model, _, _ = trained()
    with pytest.raises(ConversionError, match=r"rd-implicit starts by fit, which needs images.*it starts by random"):
        cs.convert(model, "residual->rd-implicit", start="fit")


# ONNX.

FORMS = (
    {"form": "explicit"},
    {"form": "explicit", "boundary": "zeros", "kernel_size": 5},
    {"form": "implicit"},
    {"form": "implicit", "pad": 2, "kernel_size": 5, "residual": False},
    {"form": "circulant"},
    {"form": "circulant", "norm": "none", "act": "silu", "residual": False, "kernel_size": 1},
)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("size", [(7, 6), (8, 5)], ids=str)
@pytest.mark.parametrize("inline", [False, True], ids=["functions", "inlined"])
def test_onnxruntime_computes_the_step(options: dict, size: tuple[int, int], inline: bool, tmp_path: Path) -> None:
    layer = ReactionDiffusion2d(6, step=0.4, **options).eval()
    layer.weight.data.normal_()
    path, x = tmp_path / "model.onnx", torch.randn(2, 6, *size)
    cs.export_onnx(layer, path, inline=inline, example_inputs=x)
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    everything = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    assert not {node.op_type for node in everything} & {"DFT", "STFT", "Im2Col", "Loop"}
    assert [n.op_type for n in proto.graph.node if n.domain] == ([] if inline else ["ReactionDiffusion2d"])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = copy.deepcopy(layer).double()
    for batch in (1, 3):
        x = torch.randn(batch, 6, *size)
        (got,) = session.run(None, {"input": x.numpy()})
        assert naive.error(torch.from_numpy(got), wanted(x.double())) <= 3e-6


@pytest.mark.parametrize("opset", [20, 23])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    net = nn.Sequential(*(ReactionDiffusion2d(4, form=form) for form in ("explicit", "implicit", "circulant"))).eval()
    assert cs.export_onnx(net, tmp_path / "m.onnx", opset=opset, example_inputs=torch.randn(2, 4, 6, 6)) is not None


@steps
def test_whole_model_is_exported(step: str, tmp_path: Path) -> None:
    model, _, _ = trained()
    new = cs.convert(model, f"residual->{step}")
    parity = cs.export_onnx(new, tmp_path / "model.onnx")
    assert parity is not None
    assert parity.agreement == 1


@pytest.mark.parametrize("bound", [0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("pad", [0, 2])
def test_truncated_diffusion_keeps_its_bound(bound: float, pad: int, tmp_path: Path) -> None:
    layer = ReactionDiffusion2d(4, form="implicit", step=0.3, pad=pad, act="identity", norm="none").eval()
    layer.weight.data.normal_(std=0.2)
    net, path = nn.Sequential(nn.Conv2d(4, 4, 1), layer), tmp_path / "model.onnx"
    x = torch.randn(2, 4, 15, 14)
    cs.export_onnx(net, path, example_inputs=x, diffusion=f"truncate:{bound}", tolerance=1.0)
    proto = onnx.load(str(path))
    assert not [node for node in proto.graph.node if node.domain]
    about = json.loads({prop.key: prop.value for prop in proto.metadata_props}["convsurgery.diffusion"])
    assert about["by"] == f"truncate:{bound}"
    assert about["layers"]["1"]["bound"] <= bound
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    y = net[0](x)
    largest = float((y + 0.3 * layer.reaction(y)).abs().max())
    for images in (x, x[:1]):
        (got,) = session.run(None, {"input": images.numpy()})
        assert float((torch.from_numpy(got) - net(images)).detach().abs().max()) <= bound * largest + 1e-5
    kernels = [tensor for tensor in proto.graph.initializer if tensor.name.endswith("kernel")]
    assert kernels[0].dims[-1] == about["layers"]["1"]["window"] < 15 + 2 * pad


def test_truncation_that_cannot_be_or_be_read(tmp_path: Path) -> None:
    layer = ReactionDiffusion2d(2, form="implicit", step=50.0).eval()
    layer.weight.data.normal_(std=3.0)
    x = torch.randn(2, 2, 6, 6)
    with pytest.raises(cs.errors.ExportError, match="no window within images of 6x6 pixels comes within 1e-06"):
        cs.export_onnx(layer, tmp_path / "m.onnx", example_inputs=x, diffusion="truncate:1e-6")
    for text in ("truncate", "truncate:0", "truncate:2", "truncate:small", "dft"):
        with pytest.raises(cs.errors.ExportError, match="diffusion must be matmul, or truncate:BOUND"):
            cs.export_onnx(layer, tmp_path / "m.onnx", example_inputs=x, diffusion=text)
    assert not list(tmp_path.iterdir())
    cs.export_onnx(layer, tmp_path / "m.onnx", example_inputs=x)
    props = {prop.key: prop.value for prop in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert json.loads(props["convsurgery.diffusion"]) == {"by": "matmul", "layers": {}}
