"""What a model keeps when the forward of one of its blocks is rewritten, and patterns of the user's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from test_patterns import Holder, Net, conv, settle
from timm.models import create_feature_extractor
from torch import Tensor, fx, nn

import convsurgery as cs
from convsurgery import zoo
from convsurgery.errors import ConversionError, RuleError
from convsurgery.operators import list_operators, operator

REAL = ["resnet18", "resnetv2_50", "regnety_002", "convnext_atto", "torchvision/resnet18", "torchvision/mobilenet_v2"]


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def run(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return model(x)


def real(name: str) -> nn.Module:
    options = {} if name.startswith("torchvision/") else {"drop_path_rate": 0.2}
    return (
        settle(zoo.create_model(name, num_classes=4, **options)) if "convnext" not in name else zoo.create_model(name)
    )


# --- rewriting changes nothing but where layers are kept


@pytest.mark.parametrize("rule", ["residual->block", "bottleneck->block; conv-bn-act->block", "conv-act->block"])
@pytest.mark.parametrize("name", REAL)
def test_the_null_rule_of_structures_is_bit_equal(name: str, rule: str) -> None:
    model, x = real(name), torch.randn(2, 3, 64, 64)
    try:
        new = cs.convert(model, rule)
    except cs.errors.NoMatchError:
        pytest.skip("no such block in it")
    assert type(new) is type(model)
    assert torch.equal(run(new, x), run(model, x))
    model.train(), new.train()
    first, second = run(model, x), run(new, x)
    assert torch.equal(first, second)
    first.square().sum().backward(), second.square().sum().backward()
    grads = [sorted(float(p.grad.double().abs().sum()) for p in m.parameters()) for m in (model, new)]
    assert grads[0] == grads[1]
    model.eval(), new.eval()
    assert torch.equal(run(new, x), run(model, x))  # with the statistics that training moved


def test_class_attributes_methods_and_untouched_state_are_kept() -> None:
    model = timm.create_model("resnet18", num_classes=4)
    before = copy.deepcopy(model.state_dict())
    new = cs.convert(model, "residual[name=layer1.0.*]->block")
    block = new.layer1[0]
    assert isinstance(block, type(model.layer1[0]))
    assert type(block).__name__ == "BasicBlock"
    assert block.expansion == 1
    assert callable(block.zero_init_last)
    assert "residual" in block.code
    assert isinstance(block.graph, fx.Graph)
    assert type(new.layer1[1]) is type(model.layer1[1])
    moved = {key.replace("layer1.0.", "layer1.0.residual.") if key.startswith("layer1.0.") else key for key in before}
    assert set(new.state_dict()) == moved
    assert new.feature_info == model.feature_info
    new.reset_classifier(7)
    assert new.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shared_layers_stay_where_others_use_them() -> None:
    model = zoo.create_model("torchvision/resnet18").eval()  # one ReLU is used twice in each block
    new = cs.convert(model, "conv-bn-act[name=layer1.0.*]->block")
    assert isinstance(new.layer1[0].relu, nn.ReLU)
    assert isinstance(new.layer1[0].bn1, nn.Identity)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(new(x), model(x))


def test_drop_path_and_train_flags_switch_after_rewriting() -> None:
    new = cs.convert(timm.create_model("resnet18", drop_path_rate=0.9, zero_init_last=False), "residual->block").train()
    x = torch.randn(8, 3, 32, 32)
    torch.manual_seed(0)
    assert not torch.equal(new(x), new(x))
    new.eval()
    assert torch.equal(new(x), new(x))
    assert not any(module.training for module in new.modules())


@pytest.mark.parametrize("rule", ["residual->block", "residual[index=1]->block; conv-bn->fused; first-conv->kerv-l2"])
def test_copies_saving_compiling_and_tracing(rule: str, tmp_path: Path) -> None:
    model = settle(timm.create_model("resnet18", num_classes=4))
    new, x = cs.convert(model, rule), torch.randn(2, 3, 32, 32)
    wanted = new(x)
    assert torch.equal(copy.deepcopy(new)(x), wanted)
    cs.save(new, tmp_path / "out")
    loaded = cs.load(tmp_path / "out")
    assert torch.equal(loaded(x), wanted)
    assert list(loaded.state_dict()) == list(new.state_dict())
    assert torch.equal(torch.compile(new, backend="eager", fullgraph=True)(x), wanted)
    assert torch.equal(fx.symbolic_trace(new)(x), wanted)
    assert torch.equal(create_feature_extractor(new, {"fc": "out"})(x)["out"], wanted)
    parity = cs.export_onnx(new, tmp_path / "model.onnx", example_inputs=x)
    assert parity.agreement == 1
    with pytest.raises(TypeError, match=r"a rewritten BasicBlock cannot be pickled: save the model with convsurgery"):
        pickle.dumps(new)


def test_a_converted_model_is_converted_again() -> None:
    model, x = settle(timm.create_model("resnet18", num_classes=4)), torch.randn(2, 3, 32, 32)
    new = cs.convert(model, "residual[name=layer1.*]->block")
    again = cs.convert(cs.convert(new, "conv[k=3]->kerv-linear"), "conv-bn[k=1]->fused")
    assert len(cs.record(again).plans) == 3
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)
    deeper = cs.convert(new, "residual[name=layer1.*]->block")
    assert torch.equal(deeper(x), model(x))


def test_blocks_in_blocks_and_two_in_one_forward(image: Tensor) -> None:
    inner = Net(lambda m, x: m.conv(x) + x, conv=conv())
    outer = Net(lambda m, x: m.b(m.inner(m.a(x))) + x, a=conv(), b=conv(), inner=inner)
    model = Holder(outer).eval()
    plan = cs.plan(model, "residual->block", example_inputs=image)
    assert [e.block.owner for e in plan.edits] == ["block"]
    assert torch.equal(cs.apply(model, plan)(image), model(image))
    two = Holder(Net(lambda m, x: (lambda y: m.b(y) + y)(m.a(x) + x), a=conv(), b=conv())).eval()
    new = cs.convert(two, "residual->block", example_inputs=image)
    assert [name for name, _ in new.block.named_children()] == ["a", "b", "residual", "residual_1"]
    assert torch.equal(new(image), two(image))


def test_parameters_read_by_a_block_stay_with_the_owner(image: Tensor) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gamma = conv(), nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.gamma + x

    model = Holder(Scaled()).eval()
    new = cs.convert(model, "residual->block", example_inputs=image)
    assert torch.equal(new(image), model(image))
    new(image).sum().backward()
    assert all(p.grad is not None for p in new.parameters())


def test_nothing_is_half_done_when_a_block_cannot_be_built() -> None:
    model = timm.create_model("resnet18")
    with torch.no_grad():
        model.layer3[1].conv2.weight[0, 0, 0, 0] = float("nan")
    modules, state = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConversionError, match=r"layer3\.1\.conv2: its weight holds NaN or infinity"):
        cs.convert_(model, "residual->block")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(v, state[k]) or k == "layer3.1.conv2.weight" for k, v in model.state_dict().items())


def test_data_parallel_training_of_a_rewritten_model(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        new = cs.convert(timm.create_model("resnet18", num_classes=4), "residual->block").train()
        parallel = nn.parallel.DistributedDataParallel(new)
        for _ in range(2):  # an unused parameter would fail the second time
            parallel(torch.randn(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in new.parameters())
    finally:
        dist.destroy_process_group()


#: for every operator that takes the place of a pattern: a rule, and how near its output comes; None where it does not
BLOCK_OPERATORS: dict[str, tuple[str, float | None]] = {
    "block": ("residual->block", 0.0),
    "fused": ("conv-bn->fused", 1e-12),
    "rd-explicit": ("residual->rd-explicit(kernel=1, learnable=true)", None),
    "rd-implicit": ("residual->rd-implicit(pad=1)", None),
    "rd-circulant": ("residual->rd-circulant(norm=none, kernel=1)", None),
}


def test_every_block_operator_is_tested() -> None:
    ours = {n for n in list_operators() if operator(n).patterns and operator(n).__module__.startswith("convsurgery.")}
    assert ours == set(BLOCK_OPERATORS)


@pytest.mark.parametrize("name", BLOCK_OPERATORS)
def test_block_operators(name: str, tmp_path: Path) -> None:
    rule, tolerance = BLOCK_OPERATORS[name]
    model, x = settle(timm.create_model("resnet18", num_classes=4)), torch.randn(2, 3, 32, 32)
    wanted = copy.deepcopy(model).double()
    new = cs.convert(wanted, rule)
    if tolerance is not None:
        torch.testing.assert_close(new(x.double()), wanted(x.double()), rtol=tolerance, atol=tolerance)
    plan = cs.plan(model, rule)
    single = cs.apply(model, plan)
    assert sum(p.numel() for p in single.parameters()) == plan.total_params + plan.after.params - plan.before.params
    half = cs.convert(copy.deepcopy(model).bfloat16(), rule)
    assert {p.dtype for p in half.parameters() if p.dim()} == {torch.bfloat16}
    assert cs.apply(zoo.create_model("resnet18", device="meta", num_classes=4), plan).fc.weight.is_meta
    cs.save(single, tmp_path / "out")
    assert torch.equal(cs.load(tmp_path / "out")(x), single(x))
    assert cs.export_onnx(single, tmp_path / "m.onnx", example_inputs=x).agreement == 1


# --- patterns of the user's own


def gated(x: Tensor, conv: nn.Conv2d, gate: nn.Conv2d) -> Tensor:
    return conv(x) * torch.sigmoid(gate(x))


def activated(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    return F.relu(norm(conv(x)))


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def test_a_module_is_a_pattern_of_its_classes() -> None:
    assert len(cs.plan("resnet18", [(Activated(), "block")]).edits) == 9
    assert len(cs.plan("resnet18", [(cs.pattern(Activated(), "k=7"), "block")]).edits) == 1
    assert cs.plan("resnet18", [(Activated(), cs.KervPoly())]).rule == "<Activated>->kerv-poly"


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x) * torch.sigmoid(m.b(x)),
        lambda m, x: m.b(x).sigmoid() * m.a(x),
        lambda m, x: torch.mul(m.a(x), m.b(x).sigmoid_()),
        lambda m, x: m.a(x).mul_(m.i(m.b(x)).sigmoid()),
    ],
)
def test_a_function_is_a_pattern_whatever_the_spelling(forward: Callable[..., Tensor], image: Tensor) -> None:
    model = Holder(Net(forward, a=conv(), b=conv(), i=nn.Identity())).eval()
    new = cs.convert(model, [(cs.pattern(gated), "block")], example_inputs=image)
    assert cs.record(new).edits[0].block.sites in (("block.a", "block.b"), ("block.b", "block.a"))
    assert torch.equal(new(image), model(image))


NOT_GATED = {
    "other function": lambda m, x: m.a(x) * torch.tanh(m.b(x)),
    "other operator": lambda m, x: m.a(x) + torch.sigmoid(m.b(x)),
    "other inputs": lambda m, x: m.a(x) * torch.sigmoid(m.b(x * 2)),
    "extra step": lambda m, x: m.a(x) * torch.sigmoid(m.b(x) * 2),
}


@pytest.mark.parametrize("case", NOT_GATED)
def test_what_differs_is_no_match(case: str, image: Tensor) -> None:
    model = Holder(Net(NOT_GATED[case], a=conv(), b=conv()))
    with pytest.raises(cs.errors.NoMatchError, match="nothing in the model looks like it"):
        cs.plan(model, [(cs.pattern(gated), "block")], example_inputs=image)


def test_a_match_with_two_outputs_says_so(image: Tensor) -> None:
    model = Holder(Net(lambda m, x: (lambda y: m.norm(y).relu() + y)(m.a(x)), a=conv(), norm=nn.BatchNorm2d(3)))
    with pytest.raises(cs.errors.NoMatchError, match=r"block\.a: a cut with two outputs: add also takes block\.a"):
        cs.plan(model, [(cs.pattern(activated), "block")], example_inputs=image)


def test_functions_and_layers_are_different_things() -> None:
    with pytest.raises(cs.errors.NoMatchError):
        cs.plan("resnet18", [(cs.pattern(activated), "block")])  # its ReLUs are layers


def test_an_operator_for_one_convolution_in_a_pattern(image: Tensor) -> None:
    model = Holder(Net(lambda m, x: F.relu(m.norm(m.a(x))), a=conv(), norm=nn.BatchNorm2d(3))).eval()
    new = cs.convert(model, [(cs.pattern(activated), "kerv-linear")], example_inputs=image)
    assert type(new.block.a).__name__ == "LinearKervolution2d"
    two = Holder(Net(lambda m, x: m.a(x) * torch.sigmoid(m.b(x)), a=conv(), b=conv()))
    with pytest.raises(RuleError, match="kerv-linear takes the place of one convolution, and <gated> has several"):
        cs.plan(two, [(cs.pattern(gated), "kerv-linear")], example_inputs=image)


class Wavering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.conv(x)
        return x


def double(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    return conv(x), x


def unannotated(x, conv):
    return conv(x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + y


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (Wavering(), r"the pattern <Wavering> does not trace at line \d+ \(if x.sum\(\) > 0:\): symbolically traced"),
        (double, "the pattern <double> returns tuple; a pattern has one output"),
        (unannotated, r"the pattern <unannotated>: annotate conv with the class of the layer(?s:.*)conv: nn.Conv2d"),
        (TwoInputs(), r"the pattern <TwoInputs> takes 2 tensors \(x, y\); a pattern has one input"),
        (nn.ReLU(), "the pattern <ReLU> has no Conv2d; rules replace convolutions"),
    ],
)
def test_patterns_that_cannot_be(code: object, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        cs.pattern(code)


def test_misread_tests_of_a_pattern() -> None:
    with pytest.raises(RuleError, match="unknown test 'q'"):
        cs.pattern(Activated(), "q=3")
    assert "conv1: k=7, the rule wants k=3" in misses_of(cs.pattern(Activated(), "k=3, name=conv1"))


def misses_of(selector: object) -> str:
    with pytest.raises(cs.errors.NoMatchError) as caught:
        cs.plan("resnet18", [(selector, "block")])
    return str(caught.value)
