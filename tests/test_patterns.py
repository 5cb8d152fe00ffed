"""Structural patterns: where they must fire, where they must not and why, and what replacing a block leaves alone."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import NestedGraphNet
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import convsurgery as cs
from convsurgery import zoo
from convsurgery.errors import ConversionError, NoMatchError, RuleError

PATTERNS = ("conv-bn", "conv-bn-act", "conv-act", "residual", "depthwise-separable", "bottleneck")


class Net(nn.Module):
    """Layers by name, and a function of them as forward."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Holder(nn.Module):
    """A model around one block, so that the block is not the model itself."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).mean((2, 3))


def conv(cin: int = 3, cout: int = 3, k: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, k, padding=k // 2, bias=False, **options)


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def edits(model: nn.Module, rule: str, image: Tensor) -> list[str]:
    return [entry.block.label for entry in cs.plan(model, rule, example_inputs=image).edits]


def misses(model: nn.Module, pattern: str, image: Tensor) -> str:
    with pytest.raises(NoMatchError, match="no part of the model matches") as caught:
        cs.plan(model, f"{pattern}->block", example_inputs=image)
    return str(caught.value)


# --- must fire


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("resnet18", (20, 9, 0, 8, 0, 0)),
        ("resnet50", (53, 33, 0, 16, 0, 16)),
        ("mobilenetv2_100", (52, 35, 0, 10, 17, 16)),
        ("efficientnet_b0", (49, 33, 32, 9, 0, 0)),
        ("convnext_atto", (0, 0, 12, 12, 0, 0)),
        ("densenet121", (59, 59, 0, 0, 0, 0)),
        ("regnety_002", (44, 27, 26, 13, 0, 0)),
        ("vgg11_bn", (8, 8, 0, 0, 0, 0)),
        ("xception41", (84, 32, 0, 12, 39, 26)),
        ("efficientvit_b0", (26, 11, 12, 11, 11, 10)),
        ("torchvision/resnet18", (20, 9, 0, 8, 0, 0)),
        ("torchvision/mobilenet_v2", (52, 35, 0, 10, 17, 16)),
        ("torchvision/quantized_resnet18", (20, 9, 0, 8, 0, 0)),
    ],
)
def test_patterns_in_real_models(name: str, counts: tuple[int, ...]) -> None:
    from convsurgery.graph import find_blocks, observe

    model = zoo.create_model(name, device="meta")
    seen = observe(model, zoo.example_inputs(model))
    found = [sum(c.block is not None for c in find_blocks(seen, pattern)) for pattern in PATTERNS]
    assert tuple(found) == counts


def test_patterns_in_a_detector_are_found_in_its_parts() -> None:
    plan = cs.plan("torchvision/fasterrcnn_resnet50_fpn_v2", "residual->block")
    assert len([e for e in plan.entries if e.heads_block]) == 16
    assert plan.edits[0].block.owner == "backbone.body.layer1.0"


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.PReLU(), timm.layers.Swish(), timm.layers.HardSwish()],
    ids=lambda act: type(act).__name__,
)
def test_activation_layers(act: nn.Module, image: Tensor) -> None:
    assert edits(nn.Sequential(conv(), nn.BatchNorm2d(3), act), "conv-bn-act->block", image) == ["0 … 2"]
    assert edits(nn.Sequential(conv(), act), "conv-act->block", image) == ["0 … 1"]


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        torch.relu,
        torch.relu_,
        F.silu,
        F.gelu,
        torch.sigmoid,
        F.leaky_relu,
        lambda x: x.relu(),
        lambda x: x.sigmoid_(),
    ],
)
def test_activation_functions(function: Callable[[Tensor], Tensor], image: Tensor) -> None:
    block = Net(lambda m, x: function(m.norm(m.conv(x))), conv=conv(), norm=nn.BatchNorm2d(3))
    model = Holder(block).eval()
    new = cs.convert(model, "conv-bn-act->block", example_inputs=image)
    assert [name for name, _ in new.block.conv_bn_act.named_children()] == ["conv", "norm"]
    assert torch.equal(new(image), model(image))


def test_identities_in_between_belong_to_the_block(image: Tensor) -> None:
    model = nn.Sequential(conv(), nn.Identity(), nn.BatchNorm2d(3), nn.Identity(), nn.ReLU())
    assert edits(model, "conv-bn-act->block", image) == ["0 … 4"]


def test_batchnorm_with_an_activation_of_its_own(image: Tensor) -> None:
    model = nn.Sequential(conv(), timm.layers.BatchNormAct2d(3))
    assert edits(model, "conv-bn-act->block", image) == ["0 … 1"]
    plain = nn.Sequential(conv(), timm.layers.BatchNormAct2d(3, apply_act=False))
    assert "its BatchNorm is followed by the output" in misses(plain, "conv-bn-act", image)


@pytest.mark.parametrize("add", [lambda a, b: a + b, torch.add, lambda a, b: a.add_(b), lambda a, b: b + a])
def test_sums_in_every_spelling_are_residual(add: Callable[[Tensor, Tensor], Tensor], image: Tensor) -> None:
    model = Holder(Net(lambda m, x: add(m.conv(x), x), conv=conv())).eval()
    assert len(edits(model, "residual->block", image)) == 1
    assert torch.equal(cs.convert(model, "residual->block", example_inputs=image)(image), model(image))


def test_projected_shortcuts_say_so(image: Tensor) -> None:
    plan = cs.plan("resnet18", "residual->block")
    assert [e.site.name for e in plan.edits if e.block.projected] == [f"layer{i}.0.conv1" for i in (2, 3, 4)]
    first = plan.edits[0].block
    assert (first.input_shape, first.output_shape) == ((1, 64, 56, 56), (1, 64, 56, 56))


# --- must not fire


def test_a_shared_convolution_is_no_block(image: Tensor) -> None:
    model = Net(lambda m, x: m.norm(m.conv(m.conv(x))), conv=conv(), norm=nn.BatchNorm2d(3))
    assert "conv is called 2 times" in misses(model, "conv-bn", image)


def test_a_shared_batchnorm_is_not_folded(image: Tensor) -> None:
    layers = {"a": conv(), "b": conv(), "norm": nn.BatchNorm2d(3)}
    model = Net(lambda m, x: m.norm(m.b(m.norm(m.a(x)))), **layers)
    plan = cs.plan(model, "conv-bn->fused", example_inputs=image)
    assert [e.reason for e in plan.skips] == ["norm is used elsewhere too"] * 2 or "would change" in plan.skips[
        0
    ].reason
    with pytest.raises(ConversionError, match="every convolution that conv-bn->fused takes has to stay"):
        cs.convert(model, "conv-bn->fused", example_inputs=image)


SECOND_CONSUMERS = {
    "sum": lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),
    "in-place method": lambda m, x: (lambda y: (y.relu_(), m.norm(y))[1])(m.conv(x)),
    "in-place addition": lambda m, x: (lambda y: (y.add_(1), m.norm(y))[1])(m.conv(x)),
    "in-place function": lambda m, x: (lambda y: (F.relu(y, inplace=True), m.norm(y))[1])(m.conv(x)),
    "view": lambda m, x: (lambda y: (y[:, :1].mul_(2), m.norm(y))[1])(m.conv(x)),
    "output": lambda m, x: (lambda y: [m.norm(y), y])(m.conv(x)),
}


@pytest.mark.parametrize("case", SECOND_CONSUMERS)
def test_a_second_consumer_keeps_conv_and_norm_apart(case: str, image: Tensor) -> None:
    model = Net(SECOND_CONSUMERS[case], conv=conv(), norm=nn.BatchNorm2d(3))
    assert "conv: its output goes to 2 places" in misses(model, "conv-bn", image)


BETWEEN = {
    "dropout": (
        lambda m, x: m.norm(m.mid(m.conv(x))),
        nn.Dropout(),
        r"followed by mid \(Dropout\), not by a BatchNorm",
    ),
    "drop path": (
        lambda m, x: m.norm(m.mid(m.conv(x))),
        timm.layers.DropPath(0.5),
        r"followed by mid \(DropPath\), not by a BatchNorm",
    ),
    "function": (lambda m, x: m.norm(m.conv(x) * 2), nn.Identity(), "followed by mul, not by a BatchNorm"),
    "in place": (lambda m, x: m.norm(m.conv(x).relu_()), nn.Identity(), "followed by relu_, not by a BatchNorm"),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_something_in_between_keeps_conv_and_norm_apart(case: str, image: Tensor) -> None:
    function, middle, text = BETWEEN[case]
    model = Net(function, conv=conv(), mid=middle, norm=nn.BatchNorm2d(3))
    assert re.search(text, misses(model, "conv-bn", image))


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3)]
)
def test_other_norms_are_no_batchnorm(norm: nn.Module, image: Tensor) -> None:
    assert f"({type(norm).__name__}), not by a BatchNorm" in misses(nn.Sequential(conv(), norm), "conv-bn", image)


NO_RESIDUAL = {
    "two inner convolutions each": (
        lambda m, x: m.b(m.a(x)) + m.d(m.c(x)),
        "both branches of the sum hold several convolutions",
    ),
    "no 1x1 shortcut": (lambda m, x: m.a(x) + m.b(x), "neither is a shortcut"),
    "two outputs": (
        lambda m, x: (lambda y: (m.b(y) + x) * y)(m.a(x)),
        "a cut with two outputs: mul also takes block.a (Conv2d)",
    ),
    "two inputs": (
        lambda m, x: (lambda u, s: m.b(s + u) + s)(x * 2, m.a(x)),
        "a cut with two inputs: mul also takes the input x",
    ),
    "constant": (lambda m, x: m.a(x) + 1, "nothing in the model looks like it"),
}


@pytest.mark.parametrize("case", NO_RESIDUAL)
def test_sums_that_are_no_residual_block(case: str, image: Tensor) -> None:
    function, text = NO_RESIDUAL[case]
    model = Holder(Net(function, a=conv(), b=conv(), c=conv(), d=conv()))
    assert text in misses(model, "residual", image)


def test_a_sum_with_a_parameter_is_no_residual_block(image: Tensor) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pos = conv(), nn.Parameter(torch.zeros(1, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.pos

    assert "nothing in the model looks like it" in misses(Positions(), "residual", image)


def test_an_in_place_op_on_a_shortcut_that_is_used_outside(image: Tensor) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        s = m.stem(x)
        y = m.conv(m.act(s)) + s
        return y * s

    block = Net(forward, stem=conv(), act=nn.ReLU(inplace=True), conv=conv())
    assert "act (ReLU) works in place on the input, which is used outside too" in misses(
        Holder(block), "residual", image
    )


def test_depthwise_separable_and_bottleneck_say_what_is_in_the_way(image: Tensor) -> None:
    depthwise = conv(3, 3, groups=3)
    pool = nn.Sequential(depthwise, nn.AvgPool2d(2), conv(k=1))
    assert "0: followed by 1 (AvgPool2d)" in misses(pool, "depthwise-separable", image)
    wide = nn.Sequential(depthwise, conv())
    assert "0: followed by 1 (Conv2d), which is not a pointwise convolution" in misses(
        wide, "depthwise-separable", image
    )
    assert "0: not pointwise" in misses(wide, "bottleneck", image)
    narrow = nn.Sequential(conv(k=1), conv(), conv())
    assert "its third convolution 2 (Conv2d) is not pointwise" in misses(narrow, "bottleneck", image)


class Flag(nn.Module):
    """A block whose forward asks whether it is trained."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm, self.kind = conv(), nn.BatchNorm2d(3), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "dropout":
            y = F.dropout(y, 0.5, self.training)
        elif self.training:
            y = y * 2
        return self.norm(y) + x


@pytest.mark.parametrize("kind", ["dropout", "branch"])
def test_a_forward_that_differs_in_training_is_not_rewritten(kind: str, image: Tensor) -> None:
    with pytest.raises(ConversionError, match="the forward of block differs between training and evaluation"):
        cs.convert(Holder(Flag(kind)), "residual->block", example_inputs=image)


def test_in_training_something_stands_between(image: Tensor) -> None:
    plan = cs.plan(Holder(Flag("branch")), "conv-bn->fused", example_inputs=image)
    assert [e.reason for e in plan.skips] == ["in training block computes something else here"]


def test_the_model_itself_is_not_rewritten(image: Tensor) -> None:
    model = Net(lambda m, x: m.conv(x) + x, conv=conv())
    with pytest.raises(ConversionError, match="rewriting that would change the model's class"):
        cs.convert(model, "residual->block", example_inputs=image)


def test_an_owner_with_hooks_keeps_them(image: Tensor) -> None:
    model = Holder(Net(lambda m, x: m.conv(x) + x, conv=conv())).eval()
    seen: list[int] = []
    model.block.register_forward_hook(lambda *_: seen.append(1))
    new = cs.convert(model, "residual->block", example_inputs=image)
    seen.clear()
    new(image)
    assert seen == [1]


def test_layers_with_hooks_are_not_taken_away(image: Tensor) -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(3))
    model[1].register_forward_hook(lambda *_: None)
    plan = cs.plan(model, "conv-bn->fused", example_inputs=image)
    assert [e.reason for e in plan.skips] == ["1 carries hooks; remove them, convert, and register them again"]


# --- folding


def settle(model: nn.Module) -> nn.Module:
    """BatchNorm statistics and affines that are not the ones of a new layer."""
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return model.eval()


FOLDED = {
    "plain": lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)),
    "bias, groups, dilation": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, dilation=2), nn.BatchNorm2d(6)),
    "reflect": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
    "activation": lambda: nn.Sequential(conv(3, 4), timm.layers.BatchNormAct2d(4), conv(4, 4)),
    "frozen": lambda: nn.Sequential(conv(3, 4), FrozenBatchNorm2d(4), nn.ReLU()),
    "synchronised": lambda: nn.Sequential(conv(3, 4), nn.SyncBatchNorm(4)),
    "no affine": lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False)),
    "same": lambda: nn.Sequential(timm.layers.Conv2dSame(3, 4, 3, stride=2), nn.BatchNorm2d(4)),
    "standardised": lambda: nn.Sequential(timm.layers.ScaledStdConv2d(3, 4, 3), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folding_is_exact_up_to_rounding(case: str, image: Tensor) -> None:
    model = FOLDED[case]().double()
    if case == "no affine":
        model[1].running_var.uniform_(0.5, 2)
        model.eval()
    else:
        settle(model)
    image = image.double()
    new = cs.convert(model, "conv-bn->fused", example_inputs=image)
    torch.testing.assert_close(new(image), model(image), rtol=1e-12, atol=1e-12)
    assert not any(hasattr(module, "running_mean") for module in new.modules())
    plan = cs.record(new).plans[-1]
    trainable = sum(p.numel() for p in new.parameters())
    buffers = 8 if case == "frozen" else 0  # a frozen norm has no parameters to lose
    assert trainable == plan.total_params + plan.after.params - plan.before.params + buffers * 0
    assert new(image).dtype == torch.float64


def test_folding_keeps_frozen_weights_frozen_and_the_rest_untouched() -> None:
    model = settle(timm.create_model("resnet18", num_classes=5))
    model.conv1.weight.requires_grad_(False)
    new = cs.convert(model, "conv-bn[name=conv1]->fused")
    assert (new.conv1.weight.requires_grad, new.conv1.bias.requires_grad) == (False, False)
    before, after = model.state_dict(), new.state_dict()
    assert set(before) - set(after) == {key for key in before if key.startswith("bn1.")}
    assert all(torch.equal(after[key], before[key]) for key in set(before) & set(after) - {"conv1.weight"})


def test_a_norm_of_an_unknown_class_is_not_folded(image: Tensor) -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plan = cs.plan(nn.Sequential(conv(), Doubled(3)), "conv-bn->fused", example_inputs=image)
    assert [e.reason for e in plan.skips] == ["1 is a Doubled, whose forward is not known to be a BatchNorm's"]


# --- order, overlap, and what a rule may ask


def test_of_overlapping_matches_the_first_wins_and_the_others_are_told() -> None:
    model = nn.Sequential(conv(k=1), conv(), conv(k=1), conv(), conv(k=1))
    plan = cs.plan(model, "bottleneck->block", example_inputs=torch.zeros(1, 3, 8, 8))
    assert [e.block.label for e in plan.edits] == ["0 … 2"]
    assert plan.notes == ("bottleneck at 2 … 4 overlaps with the bottleneck at 0 … 2, which comes first",)
    assert plan.notes[0] in " ".join(str(plan).split())


def test_the_first_rule_wins_over_a_block_behind_it() -> None:
    plan = cs.plan("resnet18", "first-conv->kerv-poly; conv-bn->fused; all-conv->kerv-l2")
    assert str(plan.edits[0].config) == "kerv-poly"
    assert plan.notes == ("conv-bn at conv1 … bn1 overlaps with the rule that took conv1, which comes first",)
    assert [str(e.config) for e in plan.edits[1:]] == ["fused"] * 19


def test_a_kept_block_shields_its_convolutions() -> None:
    plan = cs.plan("resnet18", "residual[in=BasicBlock]->keep; all-conv->kerv-poly")
    assert [e.site.name for e in plan.edits] == ["conv1"]


def test_tests_are_asked_of_the_first_convolution() -> None:
    assert [e.site.name for e in cs.plan("resnet18", "conv-bn[k=3, name=layer2.*]->fused").edits] == [
        f"layer2.{block}.conv{i}" for block in (0, 1) for i in (1, 2)
    ]
    assert len(cs.plan("resnet18", "residual[s=2]->block").edits) == 3
    assert len(cs.plan("resnet18", "residual[index=1]->block").edits) == 1


def test_an_operator_for_convolutions_stands_in_patterns_around_one() -> None:
    model = timm.create_model("resnet18").eval()
    new = cs.convert(model, "conv-bn-act->kerv-linear")
    assert len(cs.record(new).edits) == 9
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(new(image), model(image))


@pytest.mark.parametrize(
    ("rule", "message", "hint"),
    [
        ("conv->fused", "fused takes the place of several layers, and conv names", "write conv-bn->fused"),
        ("residual->fused", "fused takes the place of conv-bn, not of residual", "for residual: block"),
        ("bottleneck->kerv-poly", "kerv-poly takes the place of one convolution", r"conv\[in=Bottleneck\]->kerv-poly"),
    ],
)
def test_operators_that_do_not_fit_a_selector(rule: str, message: str, hint: str) -> None:
    with pytest.raises(RuleError, match=f"(?s){message}.*{hint}"):
        cs.plan("resnet18", rule)


def test_plans_with_blocks_go_to_json_and_back() -> None:
    model = timm.create_model("resnet18").eval()
    plan = cs.plan(model, "residual->block; conv-bn->fused")
    again = cs.Plan.from_json(plan.to_json())
    assert again == plan
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(cs.apply(model, again)(image), cs.apply(model, plan)(image))


def test_a_block_can_be_left_out_of_a_plan() -> None:
    plan = cs.plan("resnet18", "residual->block")
    smaller = plan.without("layer1.0.conv2")
    assert len(smaller.edits) == 7
    assert [e.reason for e in smaller.entries[1:3]] == ["left out by 'layer1.0.conv2'"] * 2
    assert smaller.before == smaller.after


def test_a_plan_for_another_model_is_refused() -> None:
    plan = cs.plan("resnet18", "residual->block")
    with pytest.raises(ConversionError, match=r"the plan is for another model: it wants a ReLU at layer1.0.act1"):
        cs.apply(timm.create_model("resnet18", act_layer=nn.SiLU), plan)
    with pytest.raises(ConversionError, match="the plan is for another model"):
        cs.apply(torchvision.models.resnet18(), plan)


def test_a_model_that_does_not_trace_says_so(image: Tensor) -> None:
    model = Net(lambda m, x: m.conv(x) + x if x.shape[0] > 1 else x, conv=conv())
    assert "patterns are found where FX traces; the model was seen by hooks alone" in misses(model, "residual", image)


def test_patterns_inside_a_nested_graph_module(image: Tensor) -> None:
    model = settle(NestedGraphNet())
    image = torch.randn(2, 3, 12, 12)
    assert edits(model, "conv-bn-act->block", image) == ["graph.0 … graph.2"]
    new = cs.convert(model, "conv-bn-act->block", example_inputs=image)
    assert torch.equal(new(image), model(image))
    folded = cs.convert(model, "conv-bn->fused", example_inputs=image)
    torch.testing.assert_close(folded(image), model(image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [f"{pattern}->block" for pattern in PATTERNS])
def test_hazards_stay_what_they_are(hazard: nn.Module, rule: str) -> None:
    """Whatever a pattern finds in them, or does not."""
    image = torch.randn(2, 3, 12, 12)
    wanted = hazard.eval()(image)
    try:
        new = cs.convert(hazard, rule, example_inputs=image)
    except (NoMatchError, ConversionError):
        assert torch.equal(hazard(image), wanted)
        return
    assert torch.equal(new(image), wanted)
