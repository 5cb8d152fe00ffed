"""Conv2d subclasses: whatever takes their place pads and computes its weight as they do."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import naive
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import (
    Conv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
    create_feature_extractor,
    is_notrace_module,
)
from timm.layers.conv2d_same import Conv2dSameExport
from torch import Tensor, fx, nn

import convsurgery as cs
from convsurgery import adapters
from convsurgery.adapters import Adapter, adapter_for, pad_same, register_adapter
from convsurgery.errors import ConvSurgeryError, ModelError
from convsurgery.operators import Start, bind
from convsurgery.operators.kervolution import LinearKervolution2d, PolyKervolution2d
from convsurgery.rules import parse_target

KINDS = (Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
SCALED = (ScaledStdConv2d, ScaledStdConv2dSame)
#: geometries: kernel, stride, dilation, depthwise
SHAPES = ((3, 1, 1, False), (3, 2, 1, True), ((2, 5), (3, 2), 1, False), (4, 3, 2, True), (1, 2, 1, False))
SIZES = ((12, 12), (13, 16), (11, 9))


def make(kind: type[nn.Conv2d], kernel: Any = 3, stride: Any = 2, dilation: int = 1, depthwise: bool = False) -> Any:
    conv = kind(
        4, 4 if depthwise else 6, kernel, stride=stride, dilation=dilation, groups=4 if depthwise else 1, bias=True
    )
    if isinstance(conv, SCALED):
        nn.init.uniform_(conv.gain, 0.5, 2.0)
    return conv


def replaced(conv: nn.Conv2d, rule: str, start: str | None = None) -> Any:
    adapter, config = adapter_for(conv), bind(parse_target(rule))
    assert adapter is not None
    plain = adapter.plain(conv)
    begin = config.start_for(None if start is None else Start.parse(start))
    return adapter.wrap(config.build(plain, begin, absorb=False).module, conv, plain)


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of its square's sum, of the input under ""."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return out.detach(), {"": x.grad, **found}


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(grad, other[name]) for name, grad in one.items())


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_same_padding_against_its_definition(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> None:
    """The output has ceil(size / stride) pixels; of the zeros needed for it, the smaller half stands before."""
    x = torch.arange(1.0, size[0] * size[1] + 1).view(1, 1, *size)
    wanted = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        outputs = math.ceil(n / s)
        total = max((outputs - 1) * s + d * (k - 1) + 1 - n, 0)
        wanted.append((total // 2, total - total // 2, outputs))
    padded = pad_same(x, kernel, stride, dilation)
    (top, bottom, height), (left, right, width) = wanted
    assert torch.equal(padded, F.pad(x, [left, right, top, bottom]))
    assert F.conv2d(padded, torch.ones(1, 1, *kernel), None, stride, 0, dilation).shape[2:] == (height, width)
    conv = Conv2dSame(1, 1, kernel, stride=stride, dilation=dilation)
    adapter = adapter_for(conv)
    assert adapter is not None
    geometry = adapter.geometry(conv)
    assert (geometry.padding_mode, geometry.padding) == ("same", (0, 0, 0, 0))
    assert geometry.output_size(*size) == (height, width)
    assert conv(x).shape[2:] == (height, width)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_null_operator_is_bit_equal(kind: type[nn.Conv2d], shape: Any, training: bool) -> None:
    if shape == (1, 2, 1, False) and not isinstance(make(kind, *shape), Conv2dSame):
        shape = (1, 1, 1, False)
    conv = make(kind, *shape).train(training)
    new = replaced(conv, "conv")
    assert isinstance(new, nn.Conv2d)
    assert new.training is training
    assert list(new.named_parameters()) == list(conv.named_parameters())  # the very objects, in the same order
    assert list(new.state_dict()) == list(conv.state_dict())
    for size in SIZES:
        x = torch.randn(2, 4, *size)
        out, grads = gradients(conv, x)
        new_out, new_grads = gradients(new, x)
        assert torch.equal(out, new_out)
        assert_same_gradients(grads, new_grads)
        assert torch.equal(conv(x[0]), new(x[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_linear_kervolution_is_bit_equal(kind: type[nn.Conv2d]) -> None:
    conv = make(kind)
    new = replaced(conv, "kerv-linear")
    x = torch.randn(2, 4, 13, 16)
    out, grads = gradients(conv, x)
    new_out, new_grads = gradients(new, x)
    assert torch.equal(out, new_out)
    if isinstance(conv, SCALED):
        assert new.conv_gain is conv.gain
        assert new.gain is None
        grads["conv_gain"] = grads.pop("gain")
    assert_same_gradients(grads, new_grads)
    assert new.weight is conv.weight if kind is Conv2dSame else new._parameters["weight"] is conv.weight


@pytest.mark.parametrize("rule", ["kerv-poly", "kerv-gauss", "kerv-sigmoid", "kerv-l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_neutral_start_is_bit_equal(kind: type[nn.Conv2d], rule: str) -> None:
    conv = make(kind)
    new = replaced(conv, rule)
    for size in SIZES:
        x = torch.randn(2, 4, *size)
        assert torch.equal(new(x), conv(x))
        assert torch.equal(new(6e4 * x), conv(6e4 * x))


@pytest.mark.parametrize("rule", ["kerv-poly", "kerv-gauss(learnable=channel)", "kerv-l1"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_layer_computes_the_same(kind: type[nn.Conv2d], rule: str) -> None:
    new = replaced(make(kind), rule)
    before = copy.deepcopy(new.state_dict())
    fused = new.fuse()
    for size in SIZES:
        x = torch.randn(2, 4, *size)
        assert naive.error(fused(x), new(x)) < 1e-6
    assert fused.weight is fused._parameters["weight"]
    assert not any("conv_" in key for key in fused.state_dict())
    assert type(fused).__name__.startswith("Same") == adapter_for(make(kind)).pads(make(kind))
    fused.absorb_affine(torch.full((6,), 2.0).double(), torch.ones(6).double())
    assert naive.error(fused(x), 2 * new(x) + 1) < 1e-6
    assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_random_start_has_its_own_weight(kind: type[nn.Conv2d]) -> None:
    conv = make(kind)
    new = replaced(conv, "kerv-poly", "random(seed=1)")
    assert new.weight is new._parameters["weight"]
    assert new.weight is not conv.weight
    assert not hasattr(new, "conv_gain")
    assert new(torch.randn(2, 4, 13, 16)).shape == conv(torch.randn(2, 4, 13, 16)).shape


@pytest.mark.parametrize("rule", ["conv", "kerv-gauss"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_compilers(kind: type[nn.Conv2d], rule: str) -> None:
    new, x = replaced(make(kind), rule), torch.randn(2, 4, 13, 16)
    out = new(x)
    stored = io.BytesIO()
    torch.save(new, stored)
    stored.seek(0)
    for copied in (
        copy.deepcopy(new),
        pickle.loads(pickle.dumps(new)),
        torch.load(stored, weights_only=False),
        fx.symbolic_trace(nn.Sequential(new)),
    ):
        assert torch.equal(copied(x), out)
    assert type(pickle.loads(pickle.dumps(new))) is type(new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated by torch, still in use
        traced: Any = torch.jit.trace(new, x)
    other = torch.randn(3, 4, 17, 10)
    assert torch.equal(traced(x), out)
    assert naive.error(traced(other), new(other)) < 1e-5
    torch._dynamo.reset()
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    assert naive.error(compiled(x), out) < 1e-5
    image = {0: torch.export.Dim("batch"), 2: torch.export.Dim("h", min=5), 3: torch.export.Dim("w", min=5)}
    exported = torch.export.export(new, (x,), dynamic_shapes=(image,)).module()
    assert naive.error(exported(other), new(other)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_state_moves(kind: type[nn.Conv2d]) -> None:
    conv, other = make(kind), make(kind)
    new = replaced(conv, "conv")
    new.load_state_dict(other.state_dict())
    x = torch.randn(2, 4, 13, 16)
    assert torch.equal(new(x), other(x))
    assert torch.equal(conv(x), other(x))  # one set of Parameters
    reduced = copy.deepcopy(new).to(torch.bfloat16)
    assert {p.dtype for p in reduced.parameters()} == {torch.bfloat16}
    assert torch.equal(reduced(x.bfloat16()), copy.deepcopy(other).to(torch.bfloat16)(x.bfloat16()))
    weight = copy.deepcopy(new._parameters["weight"])
    new.reset_parameters()
    assert not torch.equal(new._parameters["weight"], weight)
    assert "weight" not in vars(new)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_there(kind: type[nn.Conv2d]) -> None:
    new = replaced(make(kind).to("meta"), "kerv-linear")
    assert new(torch.randn(2, 4, 13, 16, device="meta")).shape == make(kind)(torch.randn(2, 4, 13, 16)).shape
    frozen = make(kind).requires_grad_(False)
    assert not adapter_for(frozen).plain(frozen).weight.requires_grad


def test_names_and_classes() -> None:
    same, scaled = replaced(make(Conv2dSame), "kerv-poly"), replaced(make(ScaledStdConv2dSame), "kerv-poly")
    assert repr(same).startswith("SamePolyDial2d(4, 6, kernel_size=(3, 3), stride=(2, 2)")
    assert type(scaled).__name__ == "ScaledStdSamePolyDial2d"
    assert isinstance(scaled, PolyKervolution2d)
    assert type(same) is type(replaced(make(Conv2dSame, 5), "kerv-poly"))
    assert not hasattr(replaced(make(Conv2dSame), "conv"), "fuse")
    static = make(ScaledStdConv2dSame, 3, 1)  # padding that is known beforehand is the convolution's own
    assert adapter_for(static).geometry(static).padding == (1, 1, 1, 1)
    assert type(replaced(static, "kerv-poly")).__name__ == "ScaledStdPolyDial2d"


def test_fx_cannot_look_inside_a_computed_weight() -> None:
    with pytest.raises(ModelError, match="FX must keep a StdPolyDial2d whole"):
        fx.symbolic_trace(replaced(make(StdConv2d), "kerv-poly"))


def test_export_variant_pads_for_every_size() -> None:
    conv, plain = Conv2dSameExport(4, 6, 3, stride=2), Conv2dSame(4, 6, 3, stride=2)
    plain.load_state_dict(conv.state_dict())
    new = replaced(conv, "conv")
    for size in SIZES:
        x = torch.randn(2, 4, *size)
        assert torch.equal(new(x), plain(x))


class Positive(nn.Conv2d):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, positive(self.weight, self.scale), self.bias, self.stride, self.padding)


def positive(stored: Tensor, scale: Tensor) -> Tensor:
    return stored.abs() * scale


class Finer(Positive):
    pass


def test_own_subclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_adapters", dict(adapters._adapters))
    model = nn.Sequential(Positive(3, 4, 3, padding=1), nn.ReLU(), Finer(4, 4, 3))
    adapter = Adapter(weight=positive, extras=("scale",), prefix="Positive")
    register_adapter(Positive, adapter)
    assert adapter_for(model[2]) is None  # exactly this class
    x = torch.randn(2, 3, 9, 9)
    new = cs.convert(model, "all-conv->kerv-linear", example_inputs=x)
    assert [type(m).__name__ for m in new] == ["PositiveLinearKervolution2d", "ReLU", "Finer"]
    assert torch.equal(new(x), model(x))
    assert list(dict(new[0].named_buffers())) == ["conv_scale"]
    for kind in (Positive, f"{__name__}.Positive", Conv2dSame, "timm.layers.conv2d_same.Conv2dSame"):
        with pytest.raises(ConvSurgeryError, match="already has an adapter"):
            register_adapter(kind, adapter)
    for wrong in (nn.Conv2d, nn.Linear):
        with pytest.raises(ConvSurgeryError, match=f"for a subclass of torch.nn.Conv2d, not for .*{wrong.__name__}"):
            register_adapter(wrong, adapter)


MODELS = ("tf_mobilenetv3_small_minimal_100", "nfnet_l0", "dm_nfnet_f0", "resnetv2_50x1_bit")


def build(name: str) -> nn.Module:
    """In eval mode, with gains that are not 1."""
    small = (
        {"depths": (1, 1, 1, 1), "channels": (32, 64, 64, 64), "group_size": 16, "num_features": 64}
        if name == "dm_nfnet_f0"
        else {}
    )
    model = timm.create_model(name, num_classes=10, **small)
    for module in model.modules():
        if isinstance(module, SCALED):
            nn.init.uniform_(module.gain, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_null_rule_on_models(name: str) -> None:
    model, image = build(name), torch.randn(1, 3, 64, 64)
    plan = cs.plan(model, "all-conv->conv", example_inputs=image)
    assert len(plan.edits) == len(plan.entries)
    new = cs.apply(model, plan)
    assert list(new.state_dict()) == list(model.state_dict())
    assert all(
        torch.equal(one, other)
        for one, other in zip(new.state_dict().values(), model.state_dict().values(), strict=True)
    )
    for size in (64, 65, 97):
        x = torch.randn(2, 3, size, size)
        for training in (False, True):
            outs = []
            for each in (model.train(training), new.train(training)):
                torch.manual_seed(0)
                outs.append(each(x))
            assert torch.equal(*outs)
    results = []
    for each in (model.eval(), new.eval()):
        results.append(gradients(each, image)[1])
    assert_same_gradients(*results)
    again = cs.convert(new, "all-conv->kerv-linear", example_inputs=image)
    assert torch.equal(again(image), model(image))


def test_timm_features_see_whole_layers() -> None:
    model = build("nfnet_l0")
    new = cs.convert(model, "all-conv->kerv-linear", example_inputs=torch.randn(1, 3, 64, 64))
    assert all(is_notrace_module(type(m)) for m in new.modules() if isinstance(m, LinearKervolution2d))
    x = torch.randn(1, 3, 64, 64)
    one, other = (create_feature_extractor(each, ["stages.1"])(x)["stages.1"] for each in (model, new))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("tf_mobilenetv3_small_minimal_100", "depthwise->kerv-poly"), ("nfnet_l0", "all-conv[k=3]->kerv-gauss")],
)
def test_saved_and_exported(name: str, rule: str, tmp_path: Path) -> None:
    model = cs.create_model(name, img_size=64, num_classes=10)
    new, x = cs.convert(model, rule).eval(), torch.randn(2, 3, 64, 64)
    cs.save(new, tmp_path / "saved")
    loaded = cs.load(tmp_path / "saved")
    assert [type(m) for m in loaded.modules()] == [type(m) for m in new.modules()]
    assert torch.equal(loaded(x), new(x))
    assert naive.error(cs.fuse(new)(x), new(x)) < 1e-5
    parity = cs.export_onnx(new, tmp_path / "model.onnx")
    assert parity is not None


class OnlyInit(nn.Conv2d):
    """Chooses its options, and carries a number."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, 2 * channels, kernel, padding=kernel // 2)
        self.tag = "mine"


class Inherits(OnlyInit):
    def extra_repr(self) -> str:
        return "mine"


class Doubles(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoublesInside(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


class Mixin:
    def __call__(self, input: Tensor) -> Tensor:
        return 3 * nn.Module.__call__(self, input)


class MixedIn(Mixin, nn.Conv2d):
    pass


class Reads(nn.Conv2d):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return 2 * value if name == "weight" else value


@pytest.mark.parametrize("kind", [OnlyInit, Inherits])
def test_a_subclass_that_only_chooses_options_is_a_convolution(kind: type[OnlyInit]) -> None:
    model, x = nn.Sequential(kind(3, 3)).eval(), torch.randn(2, 3, 9, 9)
    for rule in ("all-conv->conv", "all-conv->kerv-poly", "all-conv->kerv-gauss"):
        new = cs.convert(model, rule, example_inputs=x)
        assert type(new[0]) is not kind
        assert new[0].tag == "mine"
        assert torch.equal(new(x), model(x))


@pytest.mark.parametrize("kind", [Doubles, DoublesInside, MixedIn, Reads])
def test_a_subclass_that_computes_is_kept(kind: type[nn.Conv2d]) -> None:
    with pytest.raises(cs.errors.ConversionError, match=r"a subclass of Conv2d .* whose forward may differ"):
        cs.convert(nn.Sequential(kind(3, 4, 3)), "all-conv->conv", example_inputs=torch.randn(1, 3, 8, 8))
