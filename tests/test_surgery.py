"""Seeing, planning and applying: the invariants of the engine, on hazards and on real architectures."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import timm
import torch
import torchvision
from conftest import (
    FunctionalWeightNet,
    MixedDtypeNet,
    ParametrizedNet,
    RepeatedNet,
    ReversedNet,
    ShapeFlowNet,
    SharedNet,
    SubclassNet,
    UnusedNet,
    as_before,
)
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.errors import ArgumentError, ConversionError, ModelError, NoMatchError, RuleError, StorageError
from convsurgery.operators.kervolution import GaussKervolution2d, Kervolution2d, PolyKervolution2d
from convsurgery.surgery import record

NEUTRAL = ("kerv-poly", "kerv-sigmoid", "kerv-gauss", "kerv-l2")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


# --- the null rule


def test_null_rule_is_bit_equal_on_hazards(hazard: nn.Module, image: Tensor) -> None:
    before, wanted = state(hazard), hazard.eval()(image)
    new = cs.convert(hazard, "all-conv->conv", example_inputs=image)
    assert torch.equal(new(image), wanted)
    assert_same_state(hazard, before)
    assert_same_state(new, before)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "vgg11", "vit_tiny_patch16_224"]
)
def test_null_rule_is_bit_equal_on_timm(name: str) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(1, 3, 224, 224)
    new = cs.convert(model, "all-conv->conv")
    assert type(new) is type(model)
    assert torch.equal(new(x), model(x))
    assert_same_state(new, state(model))


def test_kerv_linear_is_bit_equal_and_replaces(image: Tensor) -> None:
    model = torchvision.models.resnet18(num_classes=5).eval()
    new = cs.convert(model, "all-conv->kerv-linear")
    assert sum(isinstance(m, Kervolution2d) for m in new.modules()) == 20
    assert torch.equal(new(image), model(image))


# --- what is seen


def test_order_is_that_of_execution_not_of_registration(image: Tensor) -> None:
    plan = cs.plan(ReversedNet(), "first-conv->conv; last-conv->keep", example_inputs=image)
    assert [entry.site.name for entry in plan.entries] == ["stem", "last"]
    assert [entry.site.name for entry in plan.edits] == ["stem"]


def test_shared_module_is_one_site_with_all_its_names(image: Tensor) -> None:
    new = cs.convert(SharedNet(), "first-conv->kerv-poly", example_inputs=image)
    (entry,) = cs.record(new).edits
    assert entry.site.names == ("first", "second", "blocks.0")
    assert entry.site.calls == 2
    assert new.first is new.second is new.blocks[0]
    assert isinstance(new.first, PolyKervolution2d)


def test_repeated_calls_are_counted_and_their_batchnorm_left_alone(image: Tensor) -> None:
    model = RepeatedNet().eval()
    plan = cs.plan(model, "all-conv->kerv-poly", example_inputs=image)
    (entry,) = plan.edits
    assert (entry.site.calls, entry.site.batchnorm, entry.absorb) == (3, None, False)
    assert entry.site.cost.macs == 3 * 3 * 27 * 144
    new = cs.apply(model, plan)
    assert torch.equal(new.norm.running_var, model.norm.running_var)
    torch.testing.assert_close(new(image), model(image), rtol=1e-3, atol=1e-4)


def test_unused_convolution_is_listed_and_stays(image: Tensor) -> None:
    plan = cs.plan(UnusedNet(), "all-conv->conv", example_inputs=image)
    (unused,) = [entry for entry in plan.entries if entry.site.index < 0]
    assert unused.site.name == "unused"
    assert unused.reason == "no forward call reaches it"
    assert "1 never called" in str(plan)


def test_weight_read_outside_is_never_replaced(image: Tensor) -> None:
    model = FunctionalWeightNet().eval()
    plan = cs.plan(model, "all-conv->kerv-poly", example_inputs=image)
    (skip,) = plan.skips
    assert (skip.site.name, skip.reason) == ("inner.conv", "its weight is read outside its own call")
    assert [entry.site.name for entry in plan.edits] == ["plain"]


def test_reading_the_dtype_of_a_weight_is_no_use_of_it(image: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.to(self.conv.weight.dtype))

    assert len(cs.plan(Net(), "all-conv->conv", example_inputs=image).edits) == 1


def test_model_that_fx_cannot_trace_is_seen_by_hooks(image: Tensor) -> None:
    model = ShapeFlowNet().eval()
    plan = cs.plan(model, "all-conv->kerv-poly", example_inputs=image)
    assert plan.seen.startswith("hooks alone (FX: ")
    assert len(plan.edits) == 1
    assert plan.edits[0].site.batchnorm is None  # no graph, so nothing is known of what follows
    torch.testing.assert_close(cs.apply(model, plan)(image), model(image), rtol=1e-3, atol=1e-4)


def test_subclasses_and_parametrized_are_skipped_with_reasons(image: Tensor) -> None:
    reasons = {e.site.name: e.reason for e in cs.plan(SubclassNet(), "all-conv->conv", example_inputs=image).skips}
    assert reasons == {"own": "a subclass of Conv2d (OwnConv) whose forward may differ; register_adapter can teach it"}
    reasons = {e.site.name: e.reason for e in cs.plan(ParametrizedNet(), "all-conv->conv", example_inputs=image).skips}
    assert reasons == {
        "normed": "its weight is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it plain",
        "hooked": "its weight is recomputed by a hook (weight norm, pruning)",
    }


def test_convolution_with_hooks_is_skipped(image: Tensor) -> None:
    model = ReversedNet()
    model.stem.register_forward_hook(lambda *_: None)
    (skip,) = cs.plan(model, "all-conv->conv", example_inputs=image).skips
    assert skip.reason == "it carries hooks; remove them, convert, and register them again"


def test_lazy_convolution_is_skipped(image: Tensor) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 1))
    (skip,) = cs.plan(model, "all-conv->conv", example_inputs=image).skips
    assert (skip.site.kind, skip.site.geometry.in_channels) == ("LazyConv2d", 3)


def test_declared_first_convolution_wins_over_the_first_executed() -> None:
    model = timm.create_model("resnet18")
    model.pretrained_cfg = {**model.pretrained_cfg, "first_conv": "layer1.0.conv1"}
    (entry,) = cs.plan(model, "first-conv->conv").edits
    assert entry.site.name == "layer1.0.conv1"


def test_declared_first_convolution_may_be_a_tuple_or_absent() -> None:
    model = timm.create_model("resnet18")
    model.pretrained_cfg = {**model.pretrained_cfg, "first_conv": ("conv1", "layer1.0.conv1")}
    assert [e.site.name for e in cs.plan(model, "first-conv->conv").edits] == ["conv1", "layer1.0.conv1"]
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "first_conv"}
    assert [e.site.name for e in cs.plan(model, "first-conv->conv").edits] == ["conv1"]


# --- the plan


def test_plan_equals_what_apply_does() -> None:
    model = timm.create_model("mobilenetv3_small_050").eval()
    plan = cs.plan(model, "depthwise->kerv-gauss(learnable=channel); pointwise[size>=14]->kerv-poly(degree=2)")
    new = cs.apply(model, plan)
    replaced = {name for name, m in new.named_modules() if isinstance(m, Kervolution2d)}
    assert replaced == {entry.site.name for entry in plan.edits}
    params = sum(p.numel() for p in new.parameters())
    assert params == plan.total_params + plan.after.params - plan.before.params
    assert params > plan.total_params
    assert cs.record(new).plans == (plan,)


def test_plan_macs_are_those_of_the_formula() -> None:
    plan = cs.plan("resnet18", "first-conv->kerv-poly; conv[name=layer1.0.conv1]->kerv-l2")
    first, second = plan.edits
    assert first.site.cost == first.after
    assert first.site.cost.macs == 64 * 3 * 49 * 112 * 112
    assert first.site.cost.params == 64 * 3 * 49
    assert second.after.macs - second.site.cost.macs == 64 * 56 * 56 + 9 * 56 * 56


def test_plan_prints_at_80_columns_and_as_html() -> None:
    rule = "conv[k=3]->kerv-poly(degree=5, balance=0.5, learnable=channel); first-conv->keep"
    plan = cs.plan("resnet34", rule)
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("resnet34 at 3x224x224: 32 of 36 convolutions are replaced")
    assert any("stays: kept" in line for line in lines)
    assert "seen by FX and hooks" in str(plan)
    page = plan._repr_html_()
    assert page.count("<tr>") == 1 + 33
    assert "layer4.2.conv2" in page
    assert "<script" not in page


def test_html_escapes_names(image: Tensor) -> None:
    class Net(ReversedNet):
        pass

    Net.__name__ = "<b>Net</b>"
    page = cs.plan(Net(), "all-conv->conv", example_inputs=image)._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;Net" in page


def test_plan_goes_to_json_and_back() -> None:
    plan = cs.plan("resnet18", "all-conv[k=3]->kerv-gauss(learnable=true); first-conv->keep", start="neutral(1e-5)")
    text = plan.to_json()
    assert cs.Plan.from_json(text) == plan
    assert json.loads(text)["entries"][1]["operator"] == "kerv-gauss(learnable=true)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not what convsurgery writes"),
        ("{}", "no 'format'"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "entries": [{}]}', "no 'site'"),
        ('{"format": 1, "entries": 3}', "not what convsurgery writes"),
    ],
)
def test_foreign_json_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        cs.Plan.from_json(text)


def test_plan_can_be_edited_and_replayed() -> None:
    model = timm.create_model("resnet18").eval()
    plan = cs.plan(model, "all-conv->kerv-poly").without("layer[34].*")
    new = cs.apply(model, cs.Plan.from_json(plan.to_json()))
    assert isinstance(new.layer2[0].conv1, PolyKervolution2d)
    assert type(new.layer3[0].conv1) is nn.Conv2d
    assert {entry.reason for entry in plan.skips} == {"left out by 'layer[34].*'"}


def test_plan_by_name_allocates_no_weights() -> None:
    plan = cs.plan("vit_giant_patch14_dinov2", "first-conv->kerv-poly")
    assert plan.total_params > 1_000_000_000
    assert plan.edits[0].site.name == "patch_embed.proj"


def test_plan_by_torchvision_name_uses_its_own_input_size() -> None:
    plan = cs.plan("torchvision/inception_v3", "first-conv->kerv-poly")
    assert plan.input_shapes == ((1, 3, 299, 299),)
    assert {e.site.name for e in plan.entries if e.site.index < 0} == {"AuxLogits.conv0.conv", "AuxLogits.conv1.conv"}


# --- rules meet models


def test_first_matching_rule_wins_and_keep_shields() -> None:
    plan = cs.plan("resnet18", "first-conv->keep; conv[k=1]->kerv-poly(degree=2); all-conv->kerv-sigmoid")
    by_operator = {}
    for entry in plan.edits:
        by_operator.setdefault(str(entry.config), []).append(entry.site.name)
    assert all("conv1" not in names for names in by_operator.values())
    assert by_operator["kerv-poly(degree=2)"] == [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]
    assert len(by_operator["kerv-sigmoid"]) == 16


def test_predicates_and_config_objects() -> None:
    def deep(site: cs.Site) -> bool:
        return site.geometry.out_channels >= 256 and "BasicBlock" in site.owners

    plan = cs.plan("resnet18", [(deep, cs.KervPoly(degree=2)), ("first-conv", "kerv-l2")])
    assert plan.rule == "<deep>->kerv-poly(degree=2); first-conv->kerv-l2"
    assert {str(e.config) for e in plan.edits} == {"kerv-poly(degree=2)", "kerv-l2"}
    assert (
        cs.plan("resnet18", [("first-conv", cs.KervPoly())]).edits == cs.plan("resnet18", "first-conv->kerv-poly").edits
    )


@pytest.mark.parametrize(
    ("rule", "message", "caret"),
    [
        ("first-conv->kerv-pol", "unknown operator 'kerv-pol'", (12, 8)),
        ("first-conv->kerv-poly(degre=3)", "kerv-poly has no argument 'degre'", (22, 7)),
        ("first-conv->kerv-poly(degree=0)", "degree wants an integer from 1 to 64, not 0", (22, 8)),
        ("first-conv->kerv-poly(degree=2.5)", "degree wants an integer from 1 to 64, not 2.5", (22, 10)),
        ("first-conv->kerv-gauss(gamma=true)", "gamma wants a number > 0, not true", (23, 10)),
        ("first-conv->kerv-poly(learnable=maybe)", "learnable wants true or false or channel, not maybe", (22, 15)),
        ("first-conv->kerv-poly(balance=0, learnable)", "a learnable balance must start above 0", (22, 9)),
        ("residual->kerv-poly", "kerv-poly takes the place of one convolution, and residual has several", (10, 9)),
        ("conv->fused", "fused takes the place of several layers, and conv names single convolutions", (6, 5)),
        ("residual->fused", "fused takes the place of conv-bn, not of residual", (10, 5)),
        ("first-con->kerv-poly", "unknown selector 'first-con'", (0, 9)),
    ],
)
def test_rule_errors_point_at_the_place(rule: str, message: str, caret: tuple[int, int]) -> None:
    with pytest.raises(RuleError) as caught:
        cs.plan("resnet18", rule)
    first, line, mark, *_ = str(caught.value).splitlines()
    assert first == message
    assert line == "  " + rule
    assert mark == "  " + " " * caret[0] + "^" * caret[1]


def test_unknown_operator_names_the_nearest() -> None:
    with pytest.raises(RuleError, match=r"did you mean 'kerv-poly'"):
        cs.plan("resnet18", "first-conv->kerv-pol")


def test_no_match_lists_near_misses() -> None:
    with pytest.raises(NoMatchError) as caught:
        cs.plan("resnet18", "conv[k=5, s=2]->kerv-poly")
    text = str(caught.value)
    assert "no convolution matches" in text
    assert "conv1: k=7, the rule wants k=5" in text
    assert "… and 15 more" in text


def test_model_without_convolutions() -> None:
    with pytest.raises(NoMatchError, match="the model has no Conv2d"):
        cs.plan(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "all-conv->conv", example_inputs=torch.randn(1, 3, 2, 2))


def test_site_named_alone_that_cannot_be_replaced_is_an_error(image: Tensor) -> None:
    with pytest.raises(ConversionError, match=r"own cannot become kerv-poly: a subclass of Conv2d"):
        cs.plan(SubclassNet(), "first-conv->kerv-poly", example_inputs=image)
    with pytest.raises(ConversionError, match="own cannot become"):
        cs.plan(SubclassNet(), "conv[name=own]->kerv-poly", example_inputs=image)


def test_rule_whose_sites_all_stay_is_an_error(image: Tensor) -> None:
    with pytest.raises(ConversionError, match=r"has to stay:\n  own: a subclass"):
        cs.convert(SubclassNet(), "conv[cin=3]->kerv-poly", example_inputs=image)


def test_rule_that_only_keeps_converts_nothing(image: Tensor) -> None:
    model = ReversedNet().eval()
    assert torch.equal(cs.convert(model, "all-conv->keep", example_inputs=image)(image), model(image))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("neutal", "unknown start 'neutal'"),
        ("neutral(2)", "eps must be from 0 to 1, not 2"),
        ("neutral(seed=1)", "takes only eps"),
        ("copy(1)", "takes no argument"),
        ("neutral(x)", "not a number"),
    ],
)
def test_bad_starts(start: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        cs.plan("resnet18", "first-conv->kerv-poly", start=start)


def test_start_an_operator_does_not_have() -> None:
    with pytest.raises(RuleError, match="kerv-l1 has no start 'neutral'"):
        cs.plan("resnet18", "first-conv->kerv-l1", start="neutral")
    with pytest.raises(RuleError, match="the neutral start chooses gamma itself"):
        cs.plan("resnet18", "first-conv->kerv-gauss(gamma=1)", start="neutral")
    assert str(cs.plan("resnet18", "first-conv->kerv-gauss(gamma=1)").edits[0].start) == "copy"


# --- apply


def test_input_model_is_untouched_and_keeps_working() -> None:
    model = timm.create_model("resnet18", num_classes=4)
    before, x = state(model), torch.randn(1, 3, 64, 64)
    wanted = copy.deepcopy(model).eval()(x)
    new = cs.convert(model, "all-conv->kerv-gauss(learnable=channel)")
    new.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert_same_state(model, before)
    assert cs.record(model) is None
    assert torch.equal(model.eval()(x), wanted)


def test_flags_and_dtypes_are_kept(image: Tensor) -> None:
    model = MixedDtypeNet()
    new = cs.convert(model, "all-conv->kerv-poly(learnable=true)", example_inputs=image)
    assert new.full.weight.dtype == torch.float32
    assert new.reduced.weight.dtype == torch.bfloat16
    assert not new.full.weight.requires_grad
    assert not new.full.log_balance.requires_grad
    assert new.full.bias.requires_grad
    assert new.reduced.log_balance.requires_grad
    assert new.training
    assert new.full.training
    assert not new.reduced.training
    error = (new(image) - model(image)).abs().max() / model(image).abs().max()
    assert error < 0.02  # bfloat16 in the middle


def test_in_place_keeps_the_parameter_objects() -> None:
    model = timm.create_model("resnet18")
    old = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    same = cs.convert_(model, "all-conv->kerv-poly")
    assert same is model
    assert isinstance(model.conv1, PolyKervolution2d)
    assert dict(model.named_parameters()).keys() == old.keys()
    assert all(parameter is old[name] for name, parameter in model.named_parameters())
    before = model.conv1.weight.detach().clone()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.conv1.weight, before)


def test_root_convolution(image: Tensor) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    new = cs.convert(conv, "all-conv->kerv-poly", example_inputs=image)
    assert isinstance(new, PolyKervolution2d)
    assert type(conv) is nn.Conv2d
    assert cs.record(new).edits[0].site.names == ("",)
    torch.testing.assert_close(new(image), conv(image), rtol=1e-3, atol=1e-4)


def test_failure_leaves_an_in_place_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("resnet18")
    before, classes = state(model), [type(m) for m in model.modules()]
    module = sys.modules["convsurgery.surgery.apply"]
    absorb = module.absorb
    calls = []

    def fails_late(norm: nn.Module, residual: Tensor, *, undo: list[object]) -> float:
        calls.append(norm)
        if len(calls) == 12:
            raise RuntimeError("on purpose")
        return absorb(norm, residual, undo=undo)

    monkeypatch.setattr(module, "absorb", fails_late)
    plan = as_before(cs.plan(model, "all-conv->kerv-poly"))
    with pytest.raises(RuntimeError, match="on purpose"):
        module.apply_(model, plan)
    assert len(calls) == 12
    assert [type(m) for m in model.modules()] == classes
    assert_same_state(model, before)
    assert model.bn1.eps == 1e-5
    assert cs.record(model) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(value: float) -> None:
    model = timm.create_model("resnet18")
    with torch.no_grad():
        model.layer2[0].conv2.weight[0, 0, 0, 0] = value
    before = [type(m) for m in model.modules()]
    with pytest.raises(ConversionError, match=r"layer2\.0\.conv2: its weight holds NaN or infinity"):
        cs.convert_(model, "all-conv->kerv-poly")
    assert [type(m) for m in model.modules()] == before


def test_plan_of_another_model_is_refused() -> None:
    plan = cs.plan("resnet18", "all-conv->kerv-poly")
    with pytest.raises(ConversionError, match="the plan is for another model"):
        cs.apply(timm.create_model("resnet50"), plan)
    with pytest.raises(ConversionError, match="the plan is for another model: it wants a Conv2d at conv1"):
        cs.apply(timm.create_model("vgg11"), plan)


def test_class_and_api_are_kept() -> None:
    model = timm.create_model("resnet18", num_classes=4)
    new = cs.convert(model, "all-conv->kerv-poly").eval()
    x = torch.randn(1, 3, 64, 64)
    assert type(new) is type(model)
    assert new.pretrained_cfg == model.pretrained_cfg
    assert new.feature_info == model.feature_info
    assert new.forward_features(x).shape == (1, 512, 2, 2)
    new.reset_classifier(3)
    assert new(x).shape == (1, 3)
    assert "PolyDial2d(3, 64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), bias=False" in repr(new)
    assert isinstance(new.conv1, PolyKervolution2d)


def test_features_only_models() -> None:
    model = timm.create_model("resnet18", features_only=True).eval()
    new = cs.convert(model, "all-conv[k=3]->kerv-linear")
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(new(x), model(x), strict=True))
    assert new.feature_info.channels() == model.feature_info.channels()


def test_second_conversion_adds_to_the_record() -> None:
    model = timm.create_model("resnet18").eval()
    once = cs.convert(model, "first-conv->kerv-poly")
    twice = cs.convert(once, "conv[k=1]->kerv-sigmoid")
    assert len(cs.record(twice).plans) == 2
    assert len(cs.record(once).plans) == 1
    assert [e.config.name for e in cs.record(twice).edits] == ["kerv-poly"] + ["kerv-sigmoid"] * 3


def test_wrong_input_says_so(image: Tensor) -> None:
    with pytest.raises(ModelError, match=r"does not run on inputs of shape 1x3x8x8.*\n?.*example_inputs"):
        cs.plan(nn.Sequential(nn.Conv2d(3, 4, 9)), "all-conv->conv", example_inputs=torch.randn(1, 3, 8, 8))


# --- neutral


@pytest.mark.parametrize("operator", NEUTRAL)
def test_every_prediction_on_digits_is_kept(operator: str, digits: object, digits_model: nn.Module) -> None:
    new = cs.convert(digits_model, f"all-conv->{operator}")
    result = cs.evaluate(new, digits.val, teacher=digits_model)
    assert result.kept == result.samples == 450
    x = torch.cat([images for images, _ in digits.val])
    with torch.no_grad():
        assert torch.equal(new(x), digits_model(x))


@pytest.mark.parametrize("operator", NEUTRAL)
def test_batchnorm_absorbed_the_gain_of_plans_of_before(operator: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()).double()
    model(torch.randn(8, 3, 9, 9).double())
    x = torch.randn(8, 3, 9, 9).double()
    plan = as_before(cs.plan(model, f"all-conv->{operator}", example_inputs=x, start="neutral(1e-9)"))
    new = cs.apply(model, plan)
    (entry,) = cs.record(new).edits
    assert entry.absorb
    assert new[0].gain.dim() == 0  # a power of two, alike for all channels: the rest is the BatchNorm's
    assert new[0].gain.log2() == new[0].gain.log2().round()
    if operator != "kerv-sigmoid":  # its gain is a power of two already
        assert not torch.equal(new[1].running_var, model[1].running_var)
    for training in (False, True):
        torch.testing.assert_close(new.train(training)(x), model.train(training)(x), rtol=1e-5, atol=1e-6)


def test_batchnorm_of_two_convolutions_is_left_alone(image: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3, bias=False)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x)) + self.norm(self.b(x))

    plan = cs.plan(Net(), "all-conv->kerv-poly", example_inputs=image)
    assert [entry.site.batchnorm for entry in plan.edits] == [None, None]


def test_output_used_besides_its_batchnorm_is_not_absorbed(image: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model = Net().eval()
    plan = cs.plan(model, "all-conv->kerv-poly", example_inputs=image)
    assert plan.edits[0].site.batchnorm is None
    assert not as_before(plan).edits[0].absorb
    assert torch.equal(cs.apply(model, plan)(image), model(image))
    torch.testing.assert_close(cs.apply(model, as_before(plan))(image), model(image), rtol=1e-3, atol=1e-4)


def test_half_model_keeps_its_batchnorm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)).to(torch.bfloat16).eval()
    x = torch.randn(1, 3, 9, 9).to(torch.bfloat16)
    plan = cs.plan(model, "all-conv->kerv-gauss", example_inputs=x)
    assert torch.equal(cs.apply(model, plan)(x), model(x))
    new = cs.apply(model, as_before(plan))
    assert torch.equal(new[1].running_var, model[1].running_var)
    assert new[0].gain.dtype == torch.float32
    torch.testing.assert_close(new(x), model(x), rtol=0.02, atol=0.02)


def test_copy_is_the_papers_formula(image: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    new = cs.convert(model, "all-conv->kerv-poly(degree=2, balance=0.5)", example_inputs=image, start="copy")
    plain = nn.functional.conv2d(image, model[0].weight)
    torch.testing.assert_close(new(image), (plain + 0.5) ** 2 + model[0].bias.view(-1, 1, 1), rtol=1e-5, atol=1e-5)


def test_random_start_follows_its_seed_and_leaves_the_original(image: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    before, states = state(model), torch.random.get_rng_state()
    a, b, c = (cs.convert(model, "all-conv->kerv-l1", example_inputs=image, start=f"random({s})") for s in (1, 1, 2))
    assert torch.equal(a[0].weight, b[0].weight)
    assert not torch.equal(a[0].weight, c[0].weight)
    assert_same_state(model, before)
    assert torch.equal(torch.random.get_rng_state(), states)


# --- l1 and calibration


def test_l1_affine_is_the_least_squares_fit(image: Tensor) -> None:
    # The activation works in place: it must not reach what is fitted.
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(inplace=True)).double()
    x = torch.randn(16, 3, 8, 8).double()
    new = cs.convert(model, "all-conv->kerv-l1 by copy", example_inputs=x, calibration=[x[:10], (x[10:], None)])
    old, now = model[0](x), new[0](x)
    distance = cs.functional.kerv_l1(x, model[0].weight)
    for channel in range(4):
        columns = torch.stack([distance[:, channel].flatten(), torch.ones(16 * 36).double()], 1)
        wanted = torch.linalg.lstsq(columns, old[:, channel].flatten()).solution
        torch.testing.assert_close(torch.stack([new[0].gain[channel], new[0].offset[channel]]), wanted)
        torch.testing.assert_close(now[:, channel].flatten(), columns @ wanted)


def test_calibration_lowers_the_error_and_leaves_the_model(image: Tensor) -> None:
    model = timm.create_model("resnet18", num_classes=4).eval()
    before, x = state(model), torch.randn(8, 3, 64, 64)
    plain = cs.convert(model, "first-conv->kerv-l1")
    affine = cs.convert(model, "first-conv->kerv-l1 by copy", calibration=x)
    fitted = cs.convert(model, "first-conv->kerv-l1", calibration=x)
    error = {m: (m.conv1(x) - model.conv1(x)).square().mean().item() for m in (plain, affine, fitted)}
    assert error[affine] < 0.01 * error[plain]
    assert error[affine] < model.conv1(x).square().mean()
    assert error[fitted] < error[affine]
    assert_same_state(model, before)
    left = cs.calibrate(plain, x, teacher=model)
    assert list(left) == ["conv1"]
    assert 0 < left["conv1"] < 1
    assert torch.equal(plain.conv1.gain, affine.conv1.gain)


def test_failing_calibration_leaves_an_in_place_model_as_it_was() -> None:
    model = timm.create_model("resnet18")
    with pytest.raises(cs.errors.DataError, match="calibration data is empty"):
        cs.convert_(model, "first-conv->kerv-l1", calibration=[])
    assert type(model.conv1) is nn.Conv2d


def test_nothing_to_calibrate() -> None:
    model = timm.create_model("resnet18")
    new = cs.convert(model, "first-conv->kerv-linear")
    with pytest.raises(ConversionError, match="no operator of this model starts by neutral, fit, copy or blend"):
        cs.calibrate(new, torch.randn(1, 3, 64, 64), teacher=model)


# --- fuse


@pytest.mark.parametrize("operator", [*NEUTRAL, "kerv-l1", "kerv-linear"])
def test_fuse_computes_the_same_without_batchnorm(operator: str) -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=5)
    model(torch.randn(8, 3, 64, 64))
    new = cs.convert(model.eval(), f"conv[index=0..6]->{operator}", start=None)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            new.train()(torch.randn(8, 3, 64, 64))
        new.eval()
        fused = cs.fuse(new)
        torch.testing.assert_close(fused(x), new(x), rtol=1e-3, atol=1e-4)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in new.modules())
    # Two of the seven convolutions belong to squeeze-excite and have no BatchNorm.
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == norms - 5
    assert record(fused).fused
    assert not record(new).fused
    assert all(m.scale is None for m in fused.modules() if isinstance(m, Kervolution2d))


def test_timm_reparameterize_finds_fuse() -> None:
    from timm.utils import reparameterize_model

    model = cs.convert(timm.create_model("resnet18").eval(), "first-conv->kerv-gauss")
    folded = reparameterize_model(model)
    assert isinstance(folded.conv1, GaussKervolution2d)
    assert folded.conv1.scale is None
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "torchvision/vit_b_16", "resnet18", "efficientnet_b0"])
def test_traceable_models_are_seen_by_fx(name: str) -> None:
    """A class token is a parameter used by the model itself; FX must be able to follow it."""
    assert cs.plan(name, "all-conv->conv").seen == "FX and hooks"


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_are_refused_with_the_way_out(wrap: object) -> None:
    with pytest.raises(ModelError, match="convert the model itself, then compile or parallelise it"):
        cs.convert(wrap(timm.create_model("resnet10t")), "first-conv->kerv-poly")


def test_feature_extraction_by_fx_goes_on_to_work() -> None:
    from timm.models import create_feature_extractor
    from torchvision.models.feature_extraction import create_feature_extractor as extract

    model = timm.create_model("resnet10t").eval()
    new, x = cs.convert(model, "all-conv[k=3]->kerv-linear"), torch.randn(1, 3, 64, 64)
    for make in (create_feature_extractor, extract):
        wanted, got = make(model, ["layer1", "layer3"])(x), make(new, ["layer1", "layer3"])(x)
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("operator", ["kerv-poly(learnable)", "kerv-gauss", "kerv-l1", "kerv-sigmoid", "kerv-l2"])
def test_plain_fx_traces_a_converted_model(operator: str) -> None:
    new = cs.convert(timm.create_model("resnet10t").eval(), f"first-conv->{operator}")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(torch.fx.symbolic_trace(new)(x), new(x))


def test_calls_by_keyword(image: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    model = Net()
    new = cs.convert(model, "all-conv->kerv-linear", example_inputs=image)
    assert torch.equal(new(image), model(image))


def test_neutral_needs_weights() -> None:
    with pytest.raises(ConversionError, match=r"conv1\.0 has no weights to start from \(meta device\)"):
        cs.convert(cs.create_model("resnet10t", device="meta"), "first-conv->kerv-gauss")


def test_two_inputs(image: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.conv(x) - self.conv(y)

    plan = cs.plan(Net(), "all-conv->kerv-poly", example_inputs=(image, image))
    assert plan.edits[0].site.calls == 2
    assert plan.input_shapes == ((2, 3, 12, 12), (2, 3, 12, 12))
