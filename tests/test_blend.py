"""Blends: the convolution's bits at t = 0, the operator's at t = 1, and what happens to the model in between."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import naive
import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import RepeatedNet, ReversedNet, SharedNet
from operator_table import MIXES, TABLE
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.errors import ArgumentError, ConversionError
from convsurgery.graph import copy_model
from convsurgery.operators import Blend, OperatorLayer, list_operators, operator
from convsurgery.operators.diffusion import ReactionDiffusion2d
from convsurgery.operators.onnx import DOMAIN
from convsurgery.surgery.storage import CONFIG

RULES = [str(row) for row in (*TABLE, *MIXES) if "blend" in row.config.starts]
rules = pytest.mark.parametrize("rule", RULES)
#: rules whose operator beside the convolution is what ``start="copy"`` gives
COPIES = [str(row) for row in TABLE if "blend" in row.config.starts and row.config.blended_start().name == "copy"]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 4, 12, 12)


def blended(rule: str, images: Tensor) -> tuple[nn.Conv2d, Blend]:
    """A convolution of four channels, and the blend that a conversion makes of it."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    new = cs.convert(conv, f"all-conv->{rule} by blend", example_inputs=images)
    assert isinstance(new, Blend)
    return conv, new


def network(seed: int = 0) -> nn.Module:
    """A small ResNet of timm's, whose batch norms have seen images."""
    torch.manual_seed(seed)
    # Without zero_init_last the residual branches count.
    model = cs.create_model("resnet10t", num_classes=10, in_chans=1, img_size=32, zero_init_last=False)
    with torch.no_grad():
        model.train()(torch.randn(16, 1, 32, 32))
    return model.eval()


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the sum of the output's squares; of the input under ""."""
    x = x.clone().requires_grad_()
    wanted = {"": x, **{name: p for name, p in module.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(module(x).square().sum(), list(wanted.values()), allow_unused=True)
    return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def starts(model: nn.Module) -> dict[str, str]:
    done = cs.record(model)
    assert done is not None
    return {name: str(start) for name, start in done.starts.items()}


# --- what it computes


def test_every_operator_without_an_exact_copy_can_be_blended_in() -> None:
    for name in list_operators():
        known = operator(name).starts
        assert ("blend" in known) == (known.get("copy") != "exact"), name


@rules
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_at_0_outputs_gradients_and_statistics_are_the_convolutions(rule: str, training: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)
    ).train(training)
    x = torch.randn(2, 4, 12, 12)
    new = cs.convert(model, f"all-conv->{rule} by blend", example_inputs=x)
    assert cs.blends(new) == {"0": 0.0, "3": 0.0}
    assert all(module.training == training for module in new.modules())
    assert torch.equal(new(x), model(x))
    assert_same(dict(new[1].named_buffers()), dict(model[1].named_buffers()))
    wanted = gradients(model, x)
    got = {name.replace(".original", ""): grad for name, grad in gradients(new, x).items()}
    assert_same(got, wanted)


def test_at_0_infinities_of_the_operator_do_not_come_through(images: Tensor) -> None:
    conv, new = blended("kerv-poly(degree=5)", images)
    large = images * 1e20
    assert new.new(large).isinf().any()
    for training in (False, True):
        assert torch.equal(new.train(training)(large), conv(large))
    assert all(grad.isfinite().all() for grad in gradients(new, images * 1e10).values())
    with torch.no_grad():
        for parameter in new.new.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(new(images), conv(images))
    new.set_t(0.25)
    assert new(images).isnan().all()


@rules
def test_at_1_it_is_the_operator_alone(rule: str, images: Tensor) -> None:
    _, new = blended(rule, images)
    new.set_t(1)
    with torch.no_grad():
        for parameter in new.original.parameters():
            parameter.fill_(torch.nan)
    for training in (False, True):
        new.train(training)
        assert torch.equal(new(images), new.new(images))
        grads = {name.removeprefix("new."): grad for name, grad in gradients(new, images).items()}
        assert_same(grads, gradients(new.new, images))


@pytest.mark.parametrize("rule", COPIES)
def test_the_operator_beside_is_the_one_in_its_own_form(rule: str, images: Tensor) -> None:
    conv, both = blended(rule, images)
    # At t = 1 from the beginning there is no convolution left to blend with.
    new = cs.convert(conv, f"all-conv->{rule} by blend(1)", example_inputs=images)
    assert isinstance(new, OperatorLayer)
    alone = cs.convert(conv, f"all-conv->{rule} by copy", example_inputs=images)
    assert torch.equal(new(images), alone(images))
    assert torch.equal(both.new(images), alone(images))
    assert {id(p) for p in both.original.parameters()}.isdisjoint(map(id, both.new.parameters()))


@rules
@pytest.mark.parametrize("t", [0.25, 0.75])
def test_in_between_it_is_the_formula(rule: str, t: float, images: Tensor) -> None:
    conv, new = blended(rule, images)
    new.set_t(t)
    for training in (False, True):
        new.train(training)
        assert torch.equal(new(images), (1 - t) * conv(images) + t * new.new(images))
    out = new(images)
    weight = torch.randn_like(out)
    for part, share in ((new.original, 1 - t), (new.new, t)):
        learned = [p for p in part.parameters() if p.requires_grad]
        got = torch.autograd.grad(out, learned, weight, retain_graph=True)
        wanted = torch.autograd.grad(part(images), learned, weight * share)
        assert learned
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_single_images_and_channels_last(images: Tensor) -> None:
    conv, new = blended("kerv-gauss", images)
    new.set_t(0.5)
    assert new(images[0]).shape == (4, 12, 12)
    assert naive.error(new(images[0]), new(images)[0]) <= 1e-6
    last = images.to(memory_format=torch.channels_last)
    assert naive.error(new.to(memory_format=torch.channels_last)(last), 0.5 * (conv(images) + new.new(images))) <= 1e-6


def test_frozen_convolutions_are_blended_with_frozen_operators(image: Tensor) -> None:
    conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
    new = cs.convert(conv, "all-conv->kerv-poly by blend", example_inputs=image)
    assert not any(p.requires_grad for p in new.parameters())
    assert new.original is not conv


# --- how it looks to the code around it


def test_it_answers_as_the_convolution_does(images: Tensor) -> None:
    conv, new = blended("kerv-poly", images)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(new, name) == getattr(conv, name)
    assert new.padding_mode == "zeros"
    assert new.weight is new.original.weight
    assert new.bias is new.original.bias
    assert torch.equal(new.weight, conv.weight)
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        _ = new.no_such_thing
    assert not hasattr(new, "_private")
    assert "t=0.3" in repr(_at(new, 0.3))


def _at(module: Blend, t: float) -> Blend:
    module.set_t(t)
    return module


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_copies_and_pickles(t: float, image: Tensor) -> None:
    model = network()
    new = cs.convert(model, "first-conv->kerv-gauss(learnable) by blend; last-conv->pnn by blend")
    cs.set_blend(new, t)
    x = torch.randn(2, 1, 32, 32)
    wanted = new(x).detach().clone()
    for twin in (copy.deepcopy(new), copy_model(new), pickle.loads(pickle.dumps(new))):
        assert cs.blends(twin) == cs.blends(new)
        assert cs.record(twin) == cs.record(new)
        assert torch.equal(twin(x), wanted)
        cs.set_blend(twin, 0.5)
        for tensor in twin.parameters():
            tensor.data.fill_(1)
        assert set(cs.blends(new).values()) == {torch.tensor(t).item()}
        assert torch.equal(new(x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_t_stays_in_float32(dtype: torch.dtype, images: Tensor) -> None:
    _, new = blended("kerv-sigmoid", images)
    new.set_t(1e-3)
    new.to(dtype)
    assert new.t.dtype == torch.float32
    assert float(new.t) == torch.tensor(1e-3).item()
    x = images.to(dtype)
    assert new(x).dtype == dtype
    assert torch.equal(new(x), (1 - new.t) * new.original(x) + new.t * new.new(x))
    new.set_t(0)
    assert torch.equal(new(x), new.original(x))


def test_half_precision_models_are_blended_too(image: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(torch.bfloat16).eval()
    x = image.to(torch.bfloat16)
    new = cs.convert(model, "all-conv->kerv-l2 by blend", example_inputs=x)
    assert torch.equal(new(x), model(x))
    cs.set_blend(new, 1e-3)
    back = cs.load(cs.save(new, tmp_path), base=model)
    assert back[0].t.dtype == torch.float32
    assert torch.equal(back(x), new(x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiled(training: bool, images: Tensor) -> None:
    conv, new = blended("kerv-poly", images)
    new.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    for t in (0.0, 0.5, 0.25, 1.0, 0.0):
        # What was compiled must follow t, whether or not another part runs.
        new.set_t(t)
        out, wanted = compiled(images), (1 - t) * conv(images) + t * new.new(images)
        assert naive.error(out, wanted) <= 1e-6
        learned = [p for part, share in ((new.original, 1 - t), (new.new, t)) if share for p in part.parameters()]
        got = torch.autograd.grad(out.square().sum(), learned)
        for grad, other in zip(got, torch.autograd.grad(new(images).square().sum(), learned), strict=True):
            assert naive.error(grad, other) <= 1e-5


def test_t_moves_without_compiling_again(images: Tensor) -> None:
    _, new = blended("kerv-poly", images)
    new.set_t(0.5)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(new, fullgraph=True, backend=backend)
    for t in (0.5, 0.25, 0.75):
        new.set_t(t)
        assert torch.equal(compiled(images), new(images))
    assert len(graphs) == 1


# --- setting t


def test_set_blend_by_number_and_by_name(image: Tensor) -> None:
    # Registered in the opposite order of execution.
    new = cs.convert(ReversedNet(), "all-conv->kerv-poly by blend", example_inputs=image)
    assert list(cs.blends(new).items()) == [("stem", 0.0), ("last", 0.0)]
    assert cs.set_blend(new, 0.5) == {"stem": 0.5, "last": 0.5}
    assert cs.set_blend(new, {"last": 0.25}) == {"stem": 0.5, "last": 0.25}
    assert cs.blends(new) == {"stem": 0.5, "last": 0.25}
    assert cs.set_blend(new, {}) == {"stem": 0.5, "last": 0.25}
    assert torch.equal(new.last.t, torch.tensor(0.25))
    assert cs.blends(torch.compile(nn.DataParallel(new))) == cs.blends(new)
    assert cs.blends(ReversedNet()) == {}


def test_errors_of_set_blend_change_nothing(image: Tensor) -> None:
    with pytest.raises(ConversionError, match=r"nothing in this model is blended; convert with '\.\.\. by blend'"):
        cs.set_blend(cs.convert(ReversedNet(), "all-conv->kerv-poly", example_inputs=image), 0.5)
    new = cs.convert(ReversedNet(), "all-conv->kerv-poly by blend(0.125)", example_inputs=image)
    with pytest.raises(ConversionError, match="no blend is named 'stm'; did you mean 'stem'"):
        cs.set_blend(new, {"last": 0.5, "stm": 0.5})
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConversionError, match=f"stem: t must be from 0 to 1, not {value}"):
            cs.set_blend(new, {"last": 0.5, "stem": value})
        with pytest.raises(ValueError, match=f"t must be from 0 to 1, not {value}"):
            new.stem.set_t(value)
    assert cs.blends(new) == {"stem": 0.125, "last": 0.125}


def test_rules_and_start_name_blends(image: Tensor) -> None:
    model = ReversedNet()
    new = cs.convert(model, "first-conv->kerv-poly by neutral(1e-3); last-conv->kerv-l1", start="blend(0.5)",
                     example_inputs=image)  # fmt: skip
    assert cs.blends(new) == {"last": 0.5}
    assert starts(new) == {"stem": "neutral(eps=0.001)", "last": "blend(t=0.5)"}
    with pytest.raises(ArgumentError, match="t must be from 0 to 1, not 2"):
        cs.convert(model, "all-conv->kerv-poly", start="blend(2)", example_inputs=image)
    with pytest.raises(cs.ConvSurgeryError, match="kerv-linear has no start 'blend'"):
        cs.convert(model, "all-conv->kerv-linear by blend", example_inputs=image)


def test_plan_says_where_it_is_exact() -> None:
    made = cs.plan("resnet18", "first-conv->kerv-poly by blend; last-conv->pnn by blend")
    assert "kerv-poly, pnn by blend computes what the convolution did at t = 0" in str(made)
    assert cs.Plan.from_json(made.to_json()) == made
    assert not any(entry.absorb for entry in made.edits)
    made = cs.plan("resnet18", "residual->rd-explicit by blend")
    assert "rd-explicit by blend computes what the layers did at t = 0" in str(made)


# --- letting the convolution go


def test_finish_leaves_nothing_of_the_convolution(image: Tensor) -> None:
    model = ReversedNet()
    new = cs.convert(model, "all-conv->kerv-poly by blend", example_inputs=image)
    parts, gone = (new.stem.new, new.last.new), [p for b in (new.stem, new.last) for p in b.original.parameters()]
    assert cs.finish_blend(new) is new
    assert cs.blends(new) == {"stem": 0.0, "last": 0.0}  # none had arrived
    cs.set_blend(new, 1.0)
    wanted = new(image)
    assert cs.finish_blend(new) is new
    assert (new.stem, new.last) == parts
    assert cs.blends(new) == {}
    assert starts(new) == {"stem": "blend(t=1)", "last": "blend(t=1)"}
    assert torch.equal(new(image), wanted)
    alone = cs.convert(model, "all-conv->kerv-poly by copy", example_inputs=image)
    assert list(new.state_dict()) == list(alone.state_dict())
    assert torch.equal(new(image), alone(image))
    assert {id(p) for p in gone}.isdisjoint(map(id, new.parameters()))
    assert not any(isinstance(module, (Blend, nn.Conv2d)) for module in new.modules())
    again = starts(cs.finish_blend(new))
    assert again == starts(new)


def test_finish_takes_only_those_that_have_arrived(image: Tensor, tmp_path: Path) -> None:
    model = ReversedNet().eval()
    new = cs.convert(model, "all-conv->kerv-poly by blend", example_inputs=image)
    cs.set_blend(new, {"stem": 1.0, "last": 0.75})
    wanted = new(image)
    cs.finish_blend(new)
    assert cs.blends(new) == {"last": 0.75}
    assert starts(new) == {"stem": "blend(t=1)", "last": "blend"}
    assert torch.equal(new(image), wanted)
    back = cs.load(cs.save(new, tmp_path / "part"), base=model)
    assert cs.blends(back) == {"last": 0.75}
    assert torch.equal(back(image), wanted)
    cs.set_blend(new, 1.0)
    cs.finish_blend(new)
    assert starts(new) == {"stem": "blend(t=1)", "last": "blend(t=1)"}


def test_finish_at_the_root(images: Tensor) -> None:
    _, new = blended("kerv-gauss", images)
    assert cs.blends(new) == {"": 0.0}
    cs.set_blend(new, {"": 1.0})
    done = cs.finish_blend(new)
    assert done is new.new
    assert starts(done) == {"": "blend(t=1)"}


@pytest.mark.parametrize("net", [SharedNet, RepeatedNet])
def test_shared_and_repeated_convolutions(net: type[nn.Module], image: Tensor, tmp_path: Path) -> None:
    model = net().eval()
    new = cs.convert(model, "all-conv->kerv-l2 by blend", example_inputs=image).eval()
    assert torch.equal(new(image), model(image))
    if net is SharedNet:
        assert new.first is new.second is new.blocks[0]
        assert list(cs.blends(new)) == ["first", "blocks.1"]
    cs.set_blend(new, 0.5)
    back = cs.load(cs.save(new, tmp_path / "half"), base=model)
    assert torch.equal(back(image), new(image))
    assert cs.blends(back) == cs.blends(new)
    cs.set_blend(new, 1.0)
    wanted = new(image)
    cs.finish_blend(new)
    if net is SharedNet:
        assert new.first is new.second is new.blocks[0]
    assert not any(isinstance(module, (Blend, nn.Conv2d)) for module in new.modules())
    assert not any(".original." in name or ".new." in name for name in new.state_dict())
    assert torch.equal(new(image), wanted)
    back = cs.load(cs.save(new, tmp_path / "done"), base=model)
    assert torch.equal(back(image), wanted)


# --- folders


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_round_trip_is_bit_equal(t: float, tmp_path: Path) -> None:
    model = network()
    new = cs.convert(model, "first-conv->kerv-poly(learnable) by blend; conv[in=BasicBlock]->pnn by blend")
    cs.set_blend(new, t)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    x = torch.randn(2, 1, 32, 32)
    back = cs.load(cs.save(new, tmp_path / "model"))
    assert_same(back.state_dict(), new.state_dict())
    assert cs.blends(back) == cs.blends(new)
    assert cs.record(back) == cs.record(new)
    assert torch.equal(back(x), new(x))
    if t < 1:
        return
    wanted = new(x)
    cs.finish_blend(new)
    back = cs.load(cs.save(new, tmp_path / "model"))
    assert_same(back.state_dict(), new.state_dict())
    assert cs.blends(back) == {}
    assert cs.record(back) == cs.record(new)
    assert torch.equal(back(x), wanted)
    plans = json.loads((tmp_path / "model" / CONFIG).read_text())["plans"]
    assert {e["start"] for plan in plans for e in plan["entries"] if e["start"]} == {"blend(t=1)"}


def test_state_dict_brings_what_runs_along(images: Tensor) -> None:
    _, one = blended("kerv-poly", images)
    _, other = blended("kerv-poly", images)
    for t in (0.5, 1.0, 0.0):
        one.set_t(t)
        other.load_state_dict(one.state_dict())
        assert torch.equal(other(images), one(images))


# --- deployment


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_onnx(t: float, tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    x = torch.randn(3, 1, 12, 12)
    new = cs.convert(model, "first-conv->kerv-poly(degree=2) by blend", example_inputs=x)
    cs.set_blend(new, t)
    path = tmp_path / "model.onnx"
    parity = cs.export_onnx(new, path, example_inputs=x)
    assert parity is not None
    assert parity.error <= 1e-5
    nodes = onnx.load(path).graph.node
    assert sum(node.domain == DOMAIN for node in nodes) == (t > 0)
    assert sum(node.op_type == "Conv" for node in nodes) == (t < 1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    (got,) = session.run(None, {name: x.numpy()})
    conv, norm = new[0], new[1]
    operator_, original = (conv.new, conv.original)
    wanted = nn.Sequential(norm, *new[2:])((1 - t) * original(x) + t * operator_(x))
    assert naive.error(torch.from_numpy(got), wanted) <= 1e-5
    assert cs.blends(new) == {"0": torch.tensor(t).item()}


def test_fuse_half_way_keeps_the_blend(tmp_path: Path) -> None:
    new = cs.convert(network(), "first-conv->kerv-poly(learnable) by blend; last-conv->kerv-l2 by neutral")
    cs.set_blend(new, 0.5)
    x = torch.randn(2, 1, 32, 32)
    fused = cs.fuse(new)
    assert list(cs.blends(fused)) == list(cs.blends(new))
    (name,) = cs.blends(fused)
    assert not any(p.requires_grad for p in fused.get_submodule(name).new.parameters())
    assert naive.error(fused(x), new(x)) <= 1e-5
    assert cs.blends(new) == {name: 0.5}
    back = cs.load(cs.save(fused, tmp_path))
    assert cs.blends(back) == {name: 0.5}
    assert torch.equal(back(x), fused(x))


def arrived() -> tuple[nn.Module, Tensor]:
    new = cs.convert(network(), "all-conv->kerv-sigmoid by blend")
    cs.set_blend(new, 1.0)
    return new, torch.randn(2, 1, 32, 32)


def test_fuse_at_1_finishes_and_folds_the_batch_norm() -> None:
    new, x = arrived()
    names = list(cs.blends(new))
    fused = cs.fuse(new)
    assert cs.blends(fused) == {}
    assert list(cs.blends(new)) == names  # the model itself stays as it is
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.Conv2d)) for module in fused.modules())
    assert naive.error(fused(x), new(x)) <= 1e-5


def test_fused_at_1_can_be_saved_and_loaded(tmp_path: Path) -> None:
    new, x = arrived()
    fused = cs.fuse(new)
    assert set(starts(fused).values()) == {"blend(t=1)"}
    assert set(starts(new).values()) == {"blend"}
    back = cs.load(cs.save(fused, tmp_path))
    assert torch.equal(back(x), fused(x))


# --- other kinds of sites


@pytest.mark.parametrize("rule", ["kerv-poly", "kerv-gauss(learnable)", "pnn"])
def test_subclasses_of_conv2d(rule: str, tmp_path: Path) -> None:
    model = nn.Sequential(Conv2dSame(3, 4, 3, stride=2), ScaledStdConv2d(4, 5, 3), nn.Flatten()).eval()
    nn.init.uniform_(model[1].gain, 0.5, 2.0)
    x = torch.randn(2, 3, 12, 13)
    new = cs.convert(model, f"all-conv->{rule} by blend", example_inputs=x)
    assert type(new[0].original) is Conv2dSame
    assert type(new[1].original) is ScaledStdConv2d
    assert torch.equal(new(x), model(x))
    assert torch.equal(new.train()(x), model.train()(x))
    cs.set_blend(new.eval(), 0.25)
    y = 0.75 * model[0](x) + 0.25 * new[0].new(x)
    assert torch.equal(new(x), (0.75 * model[1](y) + 0.25 * new[1].new(y)).flatten(1))
    back = cs.load(cs.save(new, tmp_path / "part"), base=model.eval())
    assert torch.equal(back(x), new(x))
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), new(x))
    cs.set_blend(new, 1.0)
    wanted = new(x)
    cs.finish_blend(new)
    assert torch.equal(new(x), wanted)
    back = cs.load(cs.save(new, tmp_path / "done"), base=model)
    assert torch.equal(back(x), wanted)
    if rule.startswith("kerv"):
        alone = cs.convert(model, f"all-conv->{rule} by copy", example_inputs=x)
        assert torch.equal(new(x), alone(x))


def test_residual_blocks(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=5, zero_init_last=False).eval()
    x, rule = torch.randn(1, 3, 128, 128), "residual->rd-explicit by blend"
    new = cs.convert(model, rule, example_inputs=x)
    names = list(cs.blends(new))
    assert names
    assert torch.equal(new(x), model(x))
    twin = copy.deepcopy(model).train()
    assert torch.equal(new.train()(x.repeat(2, 1, 1, 1)), twin(x.repeat(2, 1, 1, 1)))
    after = {name.replace(".residual.original", ""): value for name, value in new.state_dict().items()}
    assert_same({name: after[name] for name in twin.state_dict()}, twin.state_dict())
    new.eval()
    for t in (0.0, 0.3, 1.0):
        cs.set_blend(new, t)
        back = cs.load(cs.save(new, tmp_path / f"{t}"))
        assert cs.blends(back) == cs.blends(new)
        assert torch.equal(back(x), new(x))
    wanted = new(x)
    cs.finish_blend(new)
    assert torch.equal(new(x), wanted)
    assert all(type(new.get_submodule(name)) is ReactionDiffusion2d for name in names)
    assert not any(name.startswith(f"{each}.original") for each in names for name in new.state_dict())
    back = cs.load(cs.save(new, tmp_path / "done"))
    assert_same(back.state_dict(), new.state_dict())
    assert torch.equal(back(x), wanted)
    assert cs.record(back) == cs.record(new)


# --- with data


@pytest.mark.parametrize("rule", ["kerv-l2", "kerv-gauss", "kerv-l1"])
def test_calibrated_kervolution_has_the_convolutions_mean_and_variance(rule: str) -> None:
    conv, x = nn.Conv2d(3, 6, 3), torch.randn(8, 3, 12, 12)
    seen: list[Any] = []
    new = cs.convert(conv, f"all-conv->{rule} by blend", calibration=x, on_layer=seen.append)
    assert cs.blends(new) == {"": 0.0}
    assert torch.equal(new(x), conv(x))
    assert [layer.name for layer in seen] == [""]
    y, z = (part(x).double().transpose(0, 1).flatten(1) for part in (conv, new.new))
    assert naive.error(z.mean(1), y.mean(1)) <= 1e-5
    assert naive.error(z.var(1), y.var(1)) <= 1e-5
    assert ((y - y.mean(1, keepdim=True)) * (z - z.mean(1, keepdim=True))).sum(1).min() > 0
    # Alone it is fitted by least squares, which shrinks.
    alone = cs.convert(conv, f"all-conv->{rule} by {'fit' if rule == 'kerv-l1' else 'copy'}", calibration=x)
    assert (alone(x).double().transpose(0, 1).flatten(1).var(1) < 0.999 * y.var(1)).all()


def test_calibration_fits_the_operator_beside_the_convolution(tmp_path: Path) -> None:
    model, x = network(), torch.randn(32, 1, 32, 32)
    rule = "first-conv->lbc by blend; conv[name=layer1.0.conv2]->pnn by blend"
    seen: list[Any] = []
    new = cs.convert(model, rule, calibration=x, on_layer=seen.append)
    assert [(layer.name, layer.method) for layer in seen] == [(name, "fit") for name in cs.blends(new)]
    assert all(layer.after < min(1.0, layer.before) for layer in seen)
    assert torch.equal(new(x), model(x))
    assert cs.calibrate(new, x, teacher=model, progress=False).keys() == cs.blends(new).keys()
    assert torch.equal(new(x), model(x))
    cs.set_blend(new, 0.5)
    back = cs.load(cs.save(new, tmp_path))
    assert torch.equal(back(x), new(x))


def test_convert_in_place_keeps_the_fit() -> None:
    model, x = network(), torch.randn(32, 1, 32, 32)
    new = cs.convert(model, "first-conv->lbc by blend", calibration=x)
    same = cs.convert_(copy.deepcopy(model), "first-conv->lbc by blend", calibration=x)
    assert_same(same.state_dict(), new.state_dict())
    cs.set_blend(new, 0.5)
    cs.set_blend(same, 0.5)
    assert torch.equal(same(x), new(x))
