"""The dialled kernels of the neutral start: the convolution itself where ε is 0, and the way from there."""

from __future__ import annotations

import copy
from typing import Any

import naive
import pytest
import timm
import torch
from operator_table import LEARNABLE, NEUTRAL, Row
from test_operators import GEOMETRIES, REDUCED, ids, make
from torch import Tensor, nn

import convsurgery as cs
import convsurgery.functional as CF
from convsurgery.errors import ArgumentError
from convsurgery.operators import Start
from convsurgery.operators.kervolution import GaussDial2d, Kervolution2d, L2Dial2d, PolyDial2d, SigmoidDial2d

neutral_rows = pytest.mark.parametrize("row", NEUTRAL, ids=ids(NEUTRAL))
KERNELS = ("kerv-poly", "kerv-sigmoid", "kerv-gauss", "kerv-l2")
kernels = pytest.mark.parametrize("kernel", KERNELS)


def same(got: Tensor, wanted: Tensor) -> bool:
    """Bit for bit, infinities and what is no number included."""
    return got.dtype == wanted.dtype and torch.allclose(got, wanted, rtol=0, atol=0, equal_nan=True)


def start(row: Row, conv: nn.Conv2d, *, absorb: bool = False) -> nn.Module:
    """What stands there by default."""
    config = row.config
    return config.build(conv, config.start_for(None), absorb=absorb).module


# --- ε = 0


@neutral_rows
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *REDUCED], ids=str)
def test_it_is_the_convolution_bit_for_bit(row: Row, geometry: str, dtype: torch.dtype) -> None:
    conv, x = make(geometry, torch.float32)
    conv, x = conv.to(dtype), x.to(dtype)
    layer = start(row, conv)
    assert torch.equal(layer(x), conv(x))
    assert torch.equal(layer(x[0]), conv(x[0]))
    with torch.no_grad():  # without a tape temporaries are overwritten
        before = x.clone()
        assert torch.equal(layer(x), conv(x))
        assert torch.equal(x, before)


#: of the inputs; and of inputs at which the convolution itself leaves the range
SIZES = {
    torch.float32: ((65_535.0, 1e5, 1e-6, 1e-30, 1e18, 1e30, 1e37), 2e38),
    torch.float64: ((65_535.0, 1e5, 1e-6, 1e150, 1e300), 1e308),
    torch.bfloat16: ((65_535.0, 1e5, 1e-6, 1e30, 1e37), 2e38),
    torch.float16: ((6e3, 1e3, 1e-6), 5e4),
}


@neutral_rows
@pytest.mark.parametrize(("dtype", "size"), [(d, s) for d, (sizes, _) in SIZES.items() for s in sizes], ids=str)
@pytest.mark.parametrize("geometry", ["k3", "valid-no-bias", "groups"])
def test_at_every_size_of_the_inputs(row: Row, dtype: torch.dtype, size: float, geometry: str) -> None:
    """Squares, sums of squares and third powers of what is in range leave it."""
    conv, x = make(geometry, torch.float64)
    conv, x = conv.to(dtype), (x * size).to(dtype)
    layer, wanted = start(row, conv), conv(x)
    assert wanted.isfinite().all()
    assert same(layer(x), wanted)
    with torch.no_grad():
        assert same(layer(x), wanted)


@neutral_rows
@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("geometry", ["k3", "valid-no-bias", "groups"])
def test_where_the_convolution_itself_leaves_the_range(row: Row, dtype: torch.dtype, geometry: str) -> None:
    """An activation behind may make a number of the infinity again."""
    conv, x = make(geometry, torch.float64)
    conv, x = conv.to(dtype), (x.clamp(-1, 1) * SIZES[dtype][1]).to(dtype)
    conv.weight.data.sign_()
    layer, wanted = start(row, conv), conv(x)
    assert x.isfinite().all()
    assert wanted.isinf().any()
    assert same(layer(x), wanted)
    assert same(torch.relu(layer(x)).clamp_max(6), torch.relu(wanted).clamp_max(6))


@neutral_rows
@pytest.mark.parametrize("dtype", REDUCED, ids=str)
@pytest.mark.parametrize("geometry", ["k3", "valid-no-bias", "circular-same"])
def test_under_autocast(row: Row, dtype: torch.dtype, geometry: str) -> None:
    conv, x = make(geometry, torch.float32)
    layer = start(row, conv)
    with torch.autocast("cpu", dtype):
        for images in (x, 300 * x):
            got, wanted = layer(images), conv(images)
            assert got.dtype == dtype
            assert same(got, wanted)


@neutral_rows
@pytest.mark.parametrize("geometry", ["k3", "groups", "reflect"])
def test_gradients_are_those_of_the_convolution(row: Row, geometry: str) -> None:
    conv, x = make(geometry, torch.float32)
    found = []
    for module in (conv, start(row, copy.deepcopy(conv))):
        images = x.clone().requires_grad_()
        (module(images) * torch.linspace(-1, 2, 6).view(-1, 1, 1)).square().sum().backward()
        found.append((images.grad, module.weight.grad, None if module.bias is None else module.bias.grad))
    (dx, dw, db), (got_x, got_w, got_b) = found
    assert torch.equal(got_x, dx)
    assert torch.equal(got_w, dw)
    assert db is None or naive.error(got_b, db) < 1e-6  # added up in another order


@neutral_rows
@pytest.mark.parametrize("absorb", [False, True])
def test_there_is_nothing_to_absorb(row: Row, absorb: bool) -> None:
    conv, _ = make("valid-no-bias", torch.float32)
    conv.weight.data *= torch.linspace(0.2, 2, 6).view(-1, 1, 1, 1)
    built = row.config.build(conv, row.config.start_for(None), absorb=absorb)
    layer = built.module
    assert built.residual is None
    assert layer.weight is conv.weight
    assert layer.gain is layer.scale is layer.offset is None
    assert float(layer.eps) == 0
    assert not row.config.leaves_gain


@neutral_rows
@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("dead", ["some", "all"])
def test_dead_filters_give_zero(row: Row, eps: float, dead: str) -> None:
    conv, x = make("valid-no-bias", torch.float32)
    gone = slice(None) if dead == "all" else slice(1, 3)
    conv.weight.data[gone] = 0
    layer = row.layer(conv, f"neutral({eps})")
    y = layer(x)
    assert torch.isfinite(y).all()
    # What the Gaussian has of them is the distance to the middle of all inputs.
    assert not y[:, gone].any() or (row.op == "kerv_gauss" and eps)
    y.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


# --- ε above 0


@neutral_rows
def test_it_leaves_the_convolution_with_its_order(row: Row) -> None:
    """distance(ε) / ε^order stays the same over the dial."""
    conv, x = make("even-same")
    wanted, limit = naive.convolve(conv, x), row.neutral
    errors = [naive.error(row.layer(conv, f"neutral({eps})")(x), wanted) for eps in limit.eps]
    if limit.order == 0:
        assert max(errors) <= row.float64
        return
    for large, tiny, before, after in zip(limit.eps, limit.eps[1:], errors, errors[1:], strict=False):
        expected = (large / tiny) ** limit.order
        assert 0.5 * expected <= before / after <= 2 * expected


@neutral_rows
@pytest.mark.parametrize("eps", [2.0**-40, 2.0**-20, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_formula_over_the_whole_dial(row: Row, eps: float, size: float) -> None:
    conv, x = make("groups")
    layer, x = row.layer(conv, f"neutral({eps})"), size * x
    assert float(layer.eps) == eps  # as it was asked for, nothing rounded
    wanted = row.naive(layer, x) if eps > 2.0**-30 else naive.convolve(conv, x)
    bound = row.float64 if eps > 2.0**-30 else 1e-7
    # The reference itself loses what the paper's own form cancels.
    assert naive.error(layer(x), wanted) <= bound + 1e-18 / eps**2 * (eps > 2.0**-30)


@neutral_rows
@pytest.mark.parametrize("eps", [2.0**-24, 2.0**-18, 2.0**-10, 2.0**-4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 8e-4), (torch.bfloat16, 6e-3), (torch.float32, 4e-7)])
def test_no_precision_is_lost_by_a_small_eps(row: Row, eps: float, dtype: torch.dtype, bound: float) -> None:
    """Nothing is large or small in between: the error is that of rounding the convolution, whatever ε."""
    torch.manual_seed(1)
    conv, x = nn.Conv2d(8, 6, 3).to(dtype), torch.randn(2, 8, 9, 9).to(dtype)
    layer = row.layer(conv, f"neutral({eps})")
    exact = row.layer(copy.deepcopy(conv).double(), f"neutral({eps})")
    assert naive.error(layer(x), exact(x.double())) <= bound


@pytest.mark.parametrize("row", [row for row in NEUTRAL if row.neutral.order], ids=str)
def test_trained_from_exactly_0(row: Row) -> None:
    """ε itself may be a parameter: its derivative at 0 is the kernel's second-order term, for tanh it is 0."""
    conv, x = make("k3")
    target = row.layer(copy.deepcopy(conv), "neutral(0.2)")
    layer = start(row, conv)
    del layer.eps
    layer.eps = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter is layer.eps)
    assert torch.equal(layer(x), conv(x))
    optimiser = torch.optim.Adam([layer.eps], lr=0.02)
    for step in range(400):
        optimiser.zero_grad()
        (layer(x) - target(x).detach()).square().mean().backward()
        if step == 0:
            assert bool((layer.eps.grad != 0).all()) == (row.op != "kerv_sigmoid")
            if row.op == "kerv_sigmoid":
                return
        optimiser.step()
    torch.testing.assert_close(layer.eps, torch.full((6,), 0.2).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize("row", [row for row in LEARNABLE if row.neutral], ids=str)
def test_learnable_hyperparameter_is_trained_from_the_start(row: Row) -> None:
    conv, x = make("k3", torch.float32)
    layer = start(row, conv)
    log = getattr(layer, layer.log_name)
    assert layer.log_name in ("log_balance", "log_gamma")
    assert not log.any()
    assert torch.equal(layer(x), conv(x))
    layer(x).square().sum().backward()
    assert log.grad.abs().min() > 0
    with torch.no_grad():
        log.add_(0.25)
    assert not torch.equal(layer(x), conv(x))
    log.data.fill_(1e4)  # bounded, as the paper's form has it
    assert torch.isfinite(layer.hyper()).all()


# --- layers made by hand


def test_layers_made_by_hand() -> None:
    x = torch.randn(2, 4, 7, 7)
    made = (
        PolyDial2d(4, 6, 3, degree=2, balance=0.5, learnable=True),
        SigmoidDial2d(4, 6, 3, padding="same"),
        GaussDial2d(4, 6, 3, groups=2, learnable="channel"),
        L2Dial2d(4, 6, 3, bias=False, stride=2),
    )
    for layer in made:
        assert isinstance(layer, Kervolution2d)
        plain = nn.Conv2d(4, 6, 3, layer.stride, layer.padding, groups=layer.groups, bias=layer.bias is not None)
        plain.load_state_dict({key: value for key, value in layer.state_dict().items() if key in ("weight", "bias")})
        assert torch.equal(layer(x), plain(x))
        layer.set_nonlinearity(0.5)
        assert not torch.equal(layer(x), plain(x))
        bent = type(layer)(4, 6, 3, layer.stride, layer.padding, groups=layer.groups, eps=0.25)
        assert bent.dial_position() == 0.25
    assert float(GaussDial2d(4, 6, 3, kappa=3.0).hyper()) == 3
    largest = float(made[2].weight.detach().square().sum((1, 2, 3)).max())
    assert largest <= float(made[2]._buffers["kappa"]) < 2 * largest
    with pytest.raises(ArgumentError, match="kappa wants a number > 0, not 0"):
        GaussDial2d(4, 6, 3, kappa=0)
    with pytest.raises(ArgumentError, match="without a balance the polynomial has no linear term"):
        PolyDial2d(4, 6, 3, balance=0.0)


# --- in models


def settled_resnet(size: float, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A ResNet-18 whose statistics are those of images up to ``size``."""
    model = timm.create_model("resnet18", num_classes=10)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand(8, 3, 48, 48) * size)
    return model.eval().to(dtype), (torch.rand(4, 3, 48, 48) * size).to(dtype)


@kernels
@pytest.mark.parametrize("size", [1.0, 255.0, 3000.0, 65_535.0])
def test_logits_of_a_network_settled_on_large_images(kernel: str, size: float) -> None:
    model, x = settled_resnet(size)
    new = cs.convert(model, f"all-conv->{kernel}")
    assert sum(isinstance(m, Kervolution2d) for m in new.modules()) == 20
    with torch.no_grad():
        assert torch.equal(new(x), model(x))
        assert torch.equal(new.train()(x), model.train()(x))


@kernels
@pytest.mark.parametrize("dtype", REDUCED, ids=str)
def test_logits_in_half_precision(kernel: str, dtype: torch.dtype) -> None:
    model, x = settled_resnet(1.0, dtype=dtype)
    with torch.no_grad():
        assert same(cs.convert(model, f"all-conv->{kernel}")(x), model(x))


@kernels
@pytest.mark.parametrize(("name", "size"), [("inception_v3", 107), ("mobileone_s0", 64), ("convnext_atto", 64)])
def test_freshly_initialised_networks_stay_finite(kernel: str, name: str, size: int) -> None:
    """Activations inside of 1e5 and more, for no statistics hold them."""
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        wanted = model(x)
        assert torch.isfinite(wanted).all()
        assert torch.equal(cs.convert(model, f"all-conv->{kernel}")(x), wanted)


@kernels
def test_state_of_everything_else_is_untouched(kernel: str) -> None:
    model, _ = settled_resnet(255.0)
    before = copy.deepcopy(model.state_dict())
    new = cs.convert(
        model, f"all-conv->{kernel}(learnable)" if kernel in ("kerv-poly", "kerv-gauss") else f"all-conv->{kernel}"
    )
    own = {"eps", "balance", "kappa", "log_balance", "log_gamma"}
    state = {key: value for key, value in new.state_dict().items() if key.rpartition(".")[2] not in own}
    assert list(state) == list(before)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert cs.record(new).norms == {}
    assert all(not entry.absorb and entry.exactness == "exact" for entry in cs.record(new).edits)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert new.get_submodule(name).eps == module.eps


@kernels
def test_checkpoint_of_the_original_means_the_same(kernel: str) -> None:
    """Another training run's weights, loaded into the converted model as its users load them."""
    model, x = settled_resnet(255.0)
    other, _ = settled_resnet(3.0)
    new = cs.convert(model, f"all-conv->{kernel}")
    missing, unexpected = new.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert {key.rpartition(".")[2] for key in missing} <= {"eps", "balance", "kappa"}
    with torch.no_grad():
        assert torch.equal(new(x), other(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*eps"):
        new.load_state_dict(other.state_dict())


@kernels
def test_checkpoint_of_the_original_leaves_what_was_dialled(kernel: str) -> None:
    model, _ = settled_resnet(1.0)
    new = cs.convert(model, f"first-conv->{kernel}", calibration=torch.rand(8, 3, 48, 48))
    cs.set_nonlinearity(new, 0.125)
    before = {key: value.clone() for key, value in new.conv1.state_dict().items() if key != "weight"}
    new.load_state_dict(model.state_dict(), strict=False)
    assert cs.nonlinearity(new) == {"conv1": 0.125}
    assert all(torch.equal(value, new.conv1.state_dict()[key]) for key, value in before.items())
    assert {"gain", "offset", "eps"} <= set(before)


@neutral_rows
def test_weights_of_the_other_form_are_refused_with_the_way_out(row: Row) -> None:
    """Either would be read into nonsense: ε means the same, the constants around it do not."""
    conv, _ = make("k3", torch.float32)
    today, old = start(row, conv), row.scaled(conv).module
    for layer, state in ((today, old.state_dict()), (old, today.state_dict())):
        before = copy.deepcopy(layer.state_dict())
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=r"convsurgery 0\.1.*\n?.*by convsurgery\.load"):
                layer.load_state_dict(state, strict=strict)
        assert all(torch.equal(value, layer.state_dict()[key]) for key, value in before.items())


@kernels
def test_plan_says_what_each_start_keeps(kernel: str) -> None:
    rule = f"conv[name=layer1.*]->{kernel}; conv[name=layer2.*]->{kernel} by neutral(0.01)"
    plan = cs.plan("resnet18", rule)
    text = " ".join(str(plan).split())
    assert f"{kernel} by neutral computes what the convolution did" in text
    assert f"{kernel} by neutral(eps=0.01) computes nearly what the convolution did" in text
    assert "its gain goes" not in text
    assert {entry.exactness for entry in plan.edits} == {"exact", "approximate"}


def test_a_number_of_0_is_the_default() -> None:
    model, x = settled_resnet(1.0)
    one, two = (cs.convert(model, f"all-conv->kerv-l2 by neutral{by}") for by in ("", "(0)"))
    assert cs.record(two).edits[0].start == Start("neutral", 0.0)
    assert cs.record(two).edits[0].exactness == "exact"
    assert torch.equal(one(x), two(x))
    assert set(cs.nonlinearity(two).values()) == {0}


def test_functional_eps_may_be_a_number_or_a_tensor() -> None:
    x, w = torch.randn(1, 4, 6, 6), torch.randn(2, 4, 3, 3)
    options: dict[str, dict[str, Any]] = {"gauss": {"kappa": 64}, "poly": {}, "sigmoid": {}, "l2": {}}
    for name, more in options.items():
        function = getattr(CF, f"kerv_{name}_dial")
        assert torch.equal(function(x, w, eps=0, **more), torch.nn.functional.conv2d(x, w))
        both = function(x, w, eps=torch.tensor([0.0, 0.5]), **more)
        assert torch.equal(both[:, :1], torch.nn.functional.conv2d(x, w)[:, :1])
        assert torch.equal(both[:, 1:], function(x, w, eps=0.5, **more)[:, 1:])
