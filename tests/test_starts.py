"""Starts: every operator keeps of the convolution what it claims, ε is chosen on data, and the dial turns it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import naive
import pytest
import torch
import torch.nn.functional as F
from operator_table import MIXES, NEUTRAL, STEPS, TABLE, MixRow, Row, StepRow
from test_operators import is_power_of_two
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.errors import ConversionError, ConvSurgeryError
from convsurgery.operators import Start, bind, list_operators, operator
from convsurgery.operators.kervolution import Kervolution2d, L1Kervolution2d
from convsurgery.rules import parse_target

KERNELS = ("kerv-poly", "kerv-sigmoid", "kerv-gauss", "kerv-l2")
kernels = pytest.mark.parametrize("kernel", KERNELS)


def pictures(count: int, channels: int = 4, size: int = 10, seed: int = 0) -> Tensor:
    """Smooth images with a little noise: their pixels tell of each other, as those of photographs do."""
    generator = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.randn(count, channels, n, n, generator=generator) for n in (5, size))
    return F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True) + 0.1 * fine


class Residual(nn.Module):
    """One residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x


def settled(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With statistics of real images, in eval mode."""
    with torch.no_grad():
        model.train()(pictures(32, seed=9))
    return model.eval().to(dtype)


def original(rule: str, start: str) -> tuple[nn.Module, str]:
    """A model that ``rule`` may begin in by ``start``, and the selector."""
    torch.manual_seed(0)
    config = bind(parse_target(rule))
    if "residual" in config.takes():
        return settled(nn.Sequential(Residual())), "residual"
    if config.takes():
        return settled(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())), "conv-bn"
    if (config.name, start) == ("pnn", "neutral"):
        return settled(nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))), "all-conv"
    return settled(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2))), "all-conv"


ROWS: tuple[Row | MixRow | StepRow | str, ...] = (*TABLE, *MIXES, *STEPS, "block", "fused")
CASES = [
    (str(row), start, claim)
    for row in ROWS
    for start, claim in bind(parse_target(str(row))).starts.items()
    if bind(parse_target(str(row))).refuses_start(start) is None
]


def claiming(*claims: str) -> pytest.MarkDecorator:
    found = [case[:2] for case in CASES if case[2] in claims]
    assert found
    return pytest.mark.parametrize(("rule", "start"), found, ids=[f"{rule} by {start}" for rule, start in found])


def test_every_start_of_every_operator_is_a_case() -> None:
    known = {(name, start) for name in list_operators() for start in operator(name).starts}
    assert {(bind(parse_target(rule)).name, start) for rule, start, _ in CASES} == known
    assert {claim for _, _, claim in CASES} == {"exact", "fitted", "none"}
    assert {start for _, start, _ in CASES} == set(Start.ARGUMENT)


# --- what a start claims


@claiming("exact")
def test_exact_is_exact(rule: str, start: str) -> None:
    model, selector = original(rule, start)
    x = pictures(4, seed=1)
    new = cs.convert(model, f"{selector}->{rule} by {start}", example_inputs=x)
    assert len(cs.record(new).edits) >= 1
    if rule == "fused":  # two roundings become one
        assert 0 < naive.error(new(x), model(x)) < 1e-6
        model, new = model.double(), cs.convert(model.double(), f"{selector}->{rule}", example_inputs=x.double())
        assert naive.error(new(x.double()), model(x.double())) < 1e-14
        return
    assert torch.equal(new(x), model(x))


@pytest.mark.parametrize("row", NEUTRAL, ids=str)
def test_approximate_falls_with_eps(row: Row) -> None:
    """A neutral start that is given an ε above 0 claims less, and holds that."""
    model, selector = original(row.rule, "neutral")
    model, x = model.double(), pictures(4, seed=1).double()
    assert [row.config.keeps(Start("neutral", eps)) for eps in (None, 0.0, 0.01)] == ["exact", "exact", "approximate"]
    errors = []
    for eps in (2.0**-6, 2.0**-10, 2.0**-14):
        new = cs.convert(model, f"{selector}->{row.rule} by neutral({eps})", example_inputs=x)
        errors.append(naive.error(new(x), model(x)))
    if not row.neutral.order:  # affine at any ε
        assert max(errors) < 1e-13
    else:
        assert errors[0] > 8 * errors[1] > 64 * errors[2] > 0


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """√(mean square over variance), channels averaged, as calibration tells it."""
    got, wanted = got.detach().double(), wanted.detach().double()
    variance = wanted.var((0, 2, 3), unbiased=False)
    return float(((got - wanted).square().mean((0, 2, 3)) / variance).mean().sqrt())


def single(rule: str) -> tuple[nn.Module, str]:
    """A model whose output is that of the only site."""
    torch.manual_seed(0)
    if "residual" in bind(parse_target(rule)).takes():
        return settled(nn.Sequential(Residual())), "residual"
    return settled(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))), "all-conv"


@claiming("fitted")
def test_fitted_is_nearer_than_any_start_without_data(rule: str, start: str) -> None:
    model, selector = single(rule)
    x, held_out = pictures(64, seed=1), pictures(64, seed=2)
    wanted = model(held_out)
    errors = {}
    for count in (8, 64):
        told: list[object] = []
        by = f"{selector}->{rule} by {start}"
        new = cs.convert(model, by, example_inputs=x, calibration=x[:count], on_layer=told.append)
        (layer,) = told
        assert layer.after <= layer.before
        assert relative_error(new(x[:count]), model(x[:count])) == pytest.approx(layer.after, rel=1e-3)
        errors[count] = relative_error(new(held_out), wanted)
    assert errors[64] <= 1.02 * errors[8]
    config = bind(parse_target(rule))
    others = [s for s in config.starts if s not in ("fit", "blend") and config.refuses_start(s) is None]
    assert others
    for other in set(others) - {"neutral"}:  # of 1x1 convolutions only
        plain = cs.convert(model, f"{selector}->{rule} by {other}", example_inputs=x)
        assert layer.after <= relative_error(plain(x), model(x))
        assert errors[64] <= relative_error(plain(held_out), wanted)


@claiming("none")
def test_none_makes_no_claim_but_runs(rule: str, start: str) -> None:
    model, selector = original(rule, start)
    x = pictures(4, seed=1)
    new = cs.convert(model, f"{selector}->{rule} by {start}", example_inputs=x)
    assert all(str(entry.start) == start for entry in cs.record(new).edits)
    y = new(x)
    assert y.shape == model(x).shape
    assert torch.isfinite(y).all()
    if rule != "kerv-poly(degree=1)":
        assert naive.error(y, model(x)) > 1e-3
    again = cs.convert(model, f"{selector}->{rule} by {start}", example_inputs=x)
    assert torch.equal(again(x), y)


# --- ε that data choose

CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
    "bias": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)),
    "alone": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=(0, 2), bias=False)),
    "groups": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)),
    "same": lambda: nn.Sequential(Conv2dSame(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)),
    "standardised": lambda: nn.Sequential(ScaledStdConv2d(4, 6, 3, padding=1)),
}
convolutions = pytest.mark.parametrize("kind", CONVOLUTIONS)


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return settled(CONVOLUTIONS[kind]())


def fitted(model: nn.Module, rule: str, x: Tensor, **options: float) -> tuple[nn.Module, object]:
    new = cs.convert(model, f"all-conv->{rule}", example_inputs=x)
    (layer,) = cs.calibrate(new, x, teacher=model, **options).layers
    return new, layer


@kernels
@convolutions
@pytest.mark.parametrize("target", [1e-3, 1e-4, 1e-5])
def test_target_is_met_in_float32(kernel: str, kind: str, target: float) -> None:
    """And not by far: twice the ε of the power of two chosen would miss it."""
    model, x = made(kind), pictures(8)
    new, layer = fitted(model, kernel, x, target=target)
    assert target / 32 < layer.after <= target
    # A batch norm behind is an affine map of each channel, which leaves the relative error as it is.
    assert relative_error(new(x), model(x)) == pytest.approx(layer.after, rel=5e-3)
    (eps,) = cs.nonlinearity(new).values()
    assert layer.note == f"ε = {eps:.1e}"
    assert (layer.method, layer.operator) == ("neutral", kernel)
    rule = f"{kernel} by neutral({min(2 * eps, 1.0)})"
    assert fitted(model, rule, x)[1].after > target
    # Gain and offset are the layer's own: the batch norm behind is as it was.
    assert new[0].gain.shape == new[0].offset.shape == (6,)
    assert cs.record(new).norms == {}
    rest = {key: value for key, value in new.state_dict().items() if not key.startswith("0.")}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in rest.items())


@kernels
def test_target_of_a_thousandth_is_the_default(kernel: str) -> None:
    model, x = made("batch norm"), pictures(8)
    one, two = (fitted(model, kernel, x, **options)[0] for options in ({}, {"target": 1e-3}))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@kernels
@pytest.mark.parametrize("target", [1e-2, 1e-4])
def test_largest_power_of_two_is_chosen(kernel: str, target: float) -> None:
    model, x = made("batch norm"), pictures(8)
    after = {2.0**-k: fitted(model, f"{kernel} by neutral({2.0**-k})", x)[1].after for k in range(1, 33)}
    new, layer = fitted(model, kernel, x, target=target)
    best = max(eps for eps, error in after.items() if error <= target)
    assert cs.nonlinearity(new) == {"0": best}
    assert layer.after == after[best]


@kernels
@pytest.mark.parametrize("count", [8, 24])
def test_choice_on_many_images_is_checked_on_all_of_them(kernel: str, count: int) -> None:
    """The first few images only narrow down: here they are calm, and those behind are not."""
    model = made("bias")
    x = pictures(count)
    x[8:] *= 3
    new, layer = fitted(model, kernel, x, target=1e-4)
    assert layer.after <= 1e-4
    assert relative_error(new(x), model(x)) <= 1.005e-4


@kernels
@convolutions
@pytest.mark.parametrize("eps", [2.0**-4, 2.0**-8])
def test_least_squares_are_never_worse_than_the_limit(kernel: str, kind: str, eps: float) -> None:
    model, x = made(kind), pictures(8)
    bare = cs.convert(model, f"all-conv->{kernel} by neutral({eps})", example_inputs=x)
    before = relative_error(bare(x), model(x))
    (layer,) = cs.calibrate(bare, x, teacher=model).layers
    after = relative_error(bare(x), model(x))
    assert after <= before * (1 + 1e-6)
    assert layer.after <= layer.before
    assert cs.nonlinearity(bare) == {"0.inner" if hasattr(bare[0], "inner") else "0": eps}
    assert layer.note.split(";")[0] == f"ε = {eps:.1e}"  # a rule's own ε is kept, and no target asked of it
    if kind == "bias" and eps > 2**-5:
        assert after < 0.9 * before


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("target", [1e-2, 1e-6])
def test_half_precision_meets_any_target(kernel: str, dtype: torch.dtype, target: float) -> None:
    """ε goes as low as it has to: at 0 there is no error, in no dtype."""
    model, x = made("bias").to(dtype), pictures(8).to(dtype)
    after = {2.0**-k: fitted(model, f"{kernel} by neutral({2.0**-k})", x)[1].after for k in range(1, 33)}
    new, layer = fitted(model, kernel, x, target=target)
    (eps,) = cs.nonlinearity(new).values()
    assert eps == max([eps for eps, error in after.items() if error <= target], default=0.0)
    assert layer.after <= target
    assert layer.note == f"ε = {eps:.1e}"
    assert new[0].eps.dtype == torch.float32


@kernels
@pytest.mark.parametrize("size", [1e5, 1e9, 1e14])
def test_large_activations_get_a_small_eps(kernel: str, size: float) -> None:
    """And where none in reach is small enough, the convolution itself."""
    model, x = made("bias"), size * pictures(8)
    new, layer = fitted(model, kernel, x)
    (eps,) = cs.nonlinearity(new).values()
    assert 0 <= layer.after <= 1e-3
    assert relative_error(new(x), model(x)) <= 1.01e-3
    assert (eps == 0) == (size == 1e14)
    if eps == 0:
        assert new[0].gain is new[0].offset is None
        assert torch.equal(new(x), model(x))
    else:
        assert 2.0**-48 <= eps < 1e-2 / size**0.5


@kernels
def test_images_behind_the_first_few_may_want_a_smaller_eps(kernel: str) -> None:
    """Those that narrow ε down are calm; the fit looks further down when the others are not."""
    model = made("bias")
    x = pictures(24)
    x[8:] *= 1e4
    new, layer = fitted(model, kernel, x, target=1e-3)
    calm, _ = fitted(model, kernel, x[:8], target=1e-3)
    assert 0 < cs.nonlinearity(new)["0"] < cs.nonlinearity(calm)["0"] / 4
    assert layer.after <= 1e-3
    assert relative_error(new(x), model(x)) <= 1.01e-3


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    model = cs.create_model("resnet10t", num_classes=5, in_chans=1, img_size=32, zero_init_last=False)
    with torch.no_grad():
        model.train()(pictures(8, 1, 32, seed=9))
    return model.eval()


@kernels
def test_fitted_model_is_saved_and_loaded(kernel: str, tmp_path: Path) -> None:
    model, x = small_resnet(), pictures(8, 1, 32)
    new = cs.convert(model, f"all-conv->{kernel}", example_inputs=x, calibration=x)
    assert cs.record(new).norms == {}
    assert all(eps > 0 for eps in cs.nonlinearity(new).values())
    back = cs.load(cs.save(new, tmp_path / "saved"))
    assert cs.record(back) == cs.record(new)
    assert cs.nonlinearity(back) == cs.nonlinearity(new)
    assert torch.equal(back(x), new(x))


@kernels
def test_batch_norm_goes_on_as_before_in_training(kernel: str) -> None:
    model, x = made("batch norm"), pictures(16)
    new, _ = fitted(model, kernel, x, target=1e-4)
    model.train(), new.train()
    assert naive.error(new(x), model(x)) < 2e-3
    before = copy.deepcopy(model)
    for _ in range(3):
        wanted, got = model(x), new(x)
    assert naive.error(got, wanted) < 2e-3
    # The statistics moved alike: in eval mode the two still agree.
    assert naive.error(new.eval()(x), model.eval()(x)) < 2e-3
    assert naive.error(model(x), before.eval()(x)) > 0.01


# --- the dial

DIALLED = [str(row) for row in NEUTRAL]
dialled = pytest.mark.parametrize("rule", DIALLED)


@dialled
def test_dial_keeps_the_response_to_small_inputs(rule: str) -> None:
    model, x = made("bias").double(), pictures(4).double()
    new = cs.convert(model, f"all-conv->{rule}", example_inputs=x)
    small = 1e-3 * x / x.abs().max()
    centre = model[0](0 * small)
    wanted = model[0](small) - centre
    errors = []
    for eps in (2.0**-12, 0.1, 1.0):
        assert cs.set_nonlinearity(new, eps) == cs.nonlinearity(new) == {"0": pytest.approx(eps, rel=1e-6)}
        errors.append(naive.error(new[0](small) - new[0](0 * small), wanted))
    assert max(errors) < 0.02
    if rule == "kerv-poly(degree=1)":
        return
    assert errors[0] < errors[2]
    # On inputs as they are, it is another function.
    assert naive.error(new[0](x), model[0](x)) > 0.05


@dialled
@pytest.mark.parametrize("eps", [2.0**-20, 2.0**-4, 1.0])
def test_dial_agrees_with_a_fresh_conversion(rule: str, eps: float) -> None:
    model, x = made("bias"), pictures(4)
    new = cs.convert(model, f"all-conv->{rule}", example_inputs=x)
    cs.set_nonlinearity(new, eps)
    fresh = cs.convert(model, f"all-conv->{rule} by neutral({eps})", example_inputs=x)
    assert cs.nonlinearity(new) == cs.nonlinearity(fresh) == {"0": eps}
    assert all(torch.equal(a, fresh.state_dict()[key]) for key, a in new.state_dict().items())
    assert torch.equal(new(x), fresh(x))
    # And back: nothing of the way is left.
    cs.set_nonlinearity(new, 0)
    assert torch.equal(new(x), model(x))


@kernels
def test_dial_is_kept_in_files_and_copies(kernel: str, tmp_path: Path) -> None:
    model, x = small_resnet(), pictures(4, 1, 32)
    new = cs.convert(model, f"conv[index=0..2]->{kernel}", example_inputs=x)
    first, *rest = cs.nonlinearity(new)
    assert len(rest) == 2
    optimised = list(new.parameters())
    told = cs.set_nonlinearity(new, {first: 0.25})
    assert told[first] == 0.25
    assert [told[name] for name in rest] == [0, 0]
    assert all(a is b for a, b in zip(optimised, new.parameters(), strict=True))
    back = cs.load(cs.save(new, tmp_path / "saved"))
    assert cs.nonlinearity(back) == cs.nonlinearity(copy.deepcopy(new)) == told
    assert torch.equal(back(x), new(x))
    cs.set_nonlinearity(back, 0.25)
    assert set(cs.nonlinearity(back).values()) == {0.25}


def test_dial_is_that_of_the_model_inside_a_wrapper() -> None:
    model, x = made("bias"), pictures(2)
    new = cs.convert(model, "all-conv->kerv-poly", example_inputs=x)
    assert cs.set_nonlinearity(torch.compile(new, backend="eager"), 0.5) == {"0": 0.5}
    assert float(new[0].eps) == 0.5


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        (-1e-9, "0: ε must be from 0 to 1, not -1e-09$"),
        (1.5, "ε must be from 0 to 1, not 1.5"),
        (float("nan"), "ε must be from 0 to 1, not nan"),
        (-0.5, "ε must be from 0 to 1"),
        ({"2": 0.5}, "no layer '2' began by neutral; known: 0"),
        ({"0": 0.5, "3": 0.1}, "no layer '3' began by neutral"),
    ],
)
def test_dial_refuses(eps: object, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    new = cs.convert(model, "first-conv->kerv-poly; all-conv->kerv-l2 by copy", example_inputs=pictures(1))
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(ConversionError, match=message):
        cs.set_nonlinearity(new, eps)
    assert all(torch.equal(value, new.state_dict()[key]) for key, value in before.items())


def test_unknown_layer_names_the_nearest_and_a_model_without_any_says_so() -> None:
    model = small_resnet()
    new = cs.convert(model, "conv[name=conv1.0]->kerv-poly")
    with pytest.raises(ConversionError, match=r"no layer 'conv1.1' began by neutral; did you mean 'conv1.0'\?"):
        cs.set_nonlinearity(new, {"conv1.1": 0.5})
    for other in (model, cs.convert(model, "conv[name=conv1.0]->kerv-poly by copy")):
        assert cs.nonlinearity(other) == {}
        with pytest.raises(ConversionError, match="no layer of this model began by neutral"):
            cs.set_nonlinearity(other, 0.5)
    layer = Kervolution2d.like.__func__(L1Kervolution2d, nn.Conv2d(3, 4, 3), centered=False)
    for ask in (lambda: layer.set_nonlinearity(0.5), layer.dial_position):
        with pytest.raises(ConvSurgeryError, match="L1Kervolution2d did not start by neutral"):
            ask()


def test_calibration_takes_a_dialled_layer_back() -> None:
    """ε was left to the data, and they choose again."""
    model, x = made("bias"), pictures(8)
    new, _ = fitted(model, "kerv-poly", x)
    chosen = cs.nonlinearity(new)
    state = copy.deepcopy(new.state_dict())
    cs.set_nonlinearity(new, 0.5)
    assert relative_error(new(x), model(x)) > 0.1
    cs.calibrate(new, x, teacher=model)
    assert cs.nonlinearity(new) == chosen
    assert all(torch.equal(value, new.state_dict()[key]) for key, value in state.items())


# --- Manhattan kervolution


def correlation(one: Tensor, other: Tensor) -> float:
    """Mean over channels."""
    a, b = (t.detach().double().transpose(0, 1).flatten(1) for t in (one, other))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())


@pytest.mark.parametrize("magnitude", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 2}], ids=["bias", "no bias", "groups"])
def test_l1_by_fit_goes_better_with_the_convolution_than_copy(magnitude: float, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, **options)).eval()
    x, held_out = magnitude * torch.randn(16, 4, 10, 10), magnitude * torch.randn(16, 4, 10, 10)
    told: list[object] = []
    new = cs.convert(model, "all-conv->kerv-l1 by fit", example_inputs=x, calibration=x, on_layer=told.append)
    affine = cs.convert(model, "all-conv->kerv-l1 by copy", example_inputs=x, calibration=x)
    assert new[0].centered
    assert not affine[0].centered
    assert is_power_of_two(new[0].scale)
    assert told[0].note == f"filters times {float(new[0].scale):g}"
    assert new[0].weight is not model[0].weight
    assert torch.equal(new[0].weight, model[0].weight)
    wanted = model(held_out)
    found = correlation(new(held_out), wanted)
    assert found > 0.7
    # Beside small images the filters are large as they are.
    assert found >= correlation(affine(held_out), wanted) + (0.2 if magnitude >= 1 else -1e-6)
    left = [relative_error(net(held_out), wanted) for net in (new, affine)]
    assert left[0] < left[1] if magnitude >= 1 else left[0] <= left[1] * (1 + 1e-6)


def test_l1_scale_follows_the_images() -> None:
    """Images k times as large want filters k times as large: the same scale relative to them, and the same error."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False)).eval(), pictures(8)
    found = [
        cs.convert(model, "all-conv->kerv-l1", example_inputs=x, calibration=k * x)[0].scale for k in (1.0, 4.0, 0.125)
    ]
    assert float(found[1]) == 4 * float(found[0])
    assert float(found[2]) == 0.125 * float(found[0])


def test_l1_by_fit_is_built_without_data() -> None:
    """What calibration fills in later begins as a binary convolution."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, bias=False), torch.randn(16, 4, 10, 10)
    layer = bind(parse_target("kerv-l1")).build(conv, Start("fit"), absorb=False).module
    assert layer.centered
    signs = F.conv2d(x, conv.weight.sign()) * conv.weight.abs().mean((1, 2, 3)).view(-1, 1, 1)
    assert correlation(layer(x), signs) > 0.85
    assert correlation(layer(x), conv(x)) > 0.7
    with pytest.raises(ConversionError, match="kerv-l1 starts by fit, which needs images: give calibration=images"):
        cs.convert(nn.Sequential(conv), "all-conv->kerv-l1 by fit", example_inputs=x)
