"""The generic battery over ``operator_table.MIXES``: operators that end in a learned 1x1 mix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from operator_table import MIXES, MixRow
from test_operator_geometry import RELIABLE, convolutions
from test_operator_onnx import PATCH_OPS, Side, all_nodes, custom
from test_operators import GEOMETRIES, REDUCED, gradients, ids, make, op_names, peak
from timm.layers import get_act_fn
from torch import Tensor, nn

import convsurgery
import convsurgery.functional as CF
from convsurgery.geometry import ConvGeometry, pair
from convsurgery.operators import OperatorLayer, bind
from convsurgery.operators.activations import ACTIVATIONS
from convsurgery.operators.lbc import LocalBinaryConv2d
from convsurgery.operators.linear_mix import LinearMix2d
from convsurgery.operators.perturbation import Perturbation2d
from convsurgery.rules import parse_target

rows = pytest.mark.parametrize("row", MIXES, ids=ids(MIXES))
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)
forms = pytest.mark.parametrize("centered", [False, True], ids=["plain", "centered"])


@pytest.fixture(autouse=True)
def one_thread_and_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make_layer(row: MixRow, geometry: str, dtype: torch.dtype, centered: bool) -> tuple[nn.Module, nn.Conv2d, Tensor]:
    conv, x = make(geometry, dtype)
    layer = row.layer(conv, (x.shape[2], x.shape[3]), "random")
    if isinstance(layer, Perturbation2d):
        layer.centered = centered
    return layer, conv, x


# Formulas.


@rows
@geometries
@forms
def test_formula(row: MixRow, geometry: str, centered: bool) -> None:
    layer, conv, x = make_layer(row, geometry, torch.float64, centered)
    assert ConvGeometry.of(conv).output_size(*x.shape[2:]) == tuple(layer(x).shape[2:])
    for images in (x, x[0]):
        wanted = row.naive(layer, images)
        assert wanted.shape == conv(images).shape
        assert naive.error(layer(images), wanted) <= row.float64
    with torch.no_grad():  # without a tape temporaries are overwritten
        before = x.clone()
        assert naive.error(layer(x), row.naive(layer, x)) <= row.float64
        assert torch.equal(x, before)


@rows
def test_formula_in_float32(row: MixRow) -> None:
    layer, _, x = make_layer(row, "groups", torch.float32, False)
    assert layer(x).dtype == torch.float32
    assert naive.error(layer(x), row.naive(layer, x)) <= row.float32


@settings(RELIABLE, max_examples=60)
@given(convolutions())
def test_every_legal_geometry(drawn: tuple[dict[str, Any], tuple[int, ...]]) -> None:
    """Same shape and bias as the convolution, and the formula."""
    options, shape = drawn
    conv, x = nn.Conv2d(**options).double(), torch.randn(shape).double()
    size = (shape[-2], shape[-1])
    for rule in ("pnn(fanout=2)", "pnn(pool=avg, noise=gaussian, trainable=true)"):
        row = MixRow(rule, naive.perturb, "", "")
        layer = row.layer(conv, size, "project")  # far masks would cost the naive form its digits
        assert layer(x).shape == conv(x).shape
        assert (layer.bias is None) == (conv.bias is None)
        assert naive.error(layer(x) + 10, row.naive(layer, x) + 10) <= 1e-14
        assert torch.isfinite(layer(x)).all()
    filters = 2 * conv.groups
    layer = MixRow("linear-mix(extend=true)", naive.linear_mixed, "", "").layer(conv, size, "random")
    assert layer(x).shape == conv(x).shape
    assert naive.error(layer(x) + 10, naive.linear_mixed(layer, x) + 10) <= 1e-14
    assert naive.error(layer.fuse()(x) + 10, layer(x) + 10) <= 1e-14
    row = MixRow(f"lbc(filters={filters})", naive.local_binary, "", "")
    layer = row.layer(conv, size, "random")
    assert layer(x).shape == conv(x).shape
    assert naive.error(layer(x) + 10, row.naive(layer, x) + 10) <= 1e-14


@rows
def test_an_empty_batch(row: MixRow) -> None:
    layer, conv, x = make_layer(row, "stride", torch.float32, False)
    assert layer(x[:0]).shape == conv(x[:0]).shape


@rows
@pytest.mark.parametrize("channels", [3, 5])
def test_input_with_other_channels_is_refused(row: MixRow, channels: int) -> None:
    layer, _, x = make_layer(row, "k3", torch.float32, False)
    with pytest.raises((RuntimeError, ValueError), match=r"channels|size of tensor|match"):
        layer(torch.randn(2, channels, *x.shape[2:]))


@rows
def test_image_smaller_than_the_window_is_refused(row: MixRow) -> None:
    layer, _, _ = make_layer(row, "k3", torch.float32, False)
    with pytest.raises((RuntimeError, convsurgery.ConvSurgeryError), match="size"):
        layer(torch.randn(2, 4, 2, 2))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_timms(name: str) -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    wanted = x if name == "identity" else get_act_fn(name)(x)
    torch.testing.assert_close(ACTIVATIONS[name].function(x), wanted, rtol=1e-14, atol=1e-15)


# Gradients.


def as_function(layer: nn.Module, x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    named = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(named, values, strict=True)), (x,))

    return function, (x.requires_grad_(), *named.values())


def small(row: MixRow, centered: bool) -> tuple[nn.Module, Tensor]:
    conv = nn.Conv2d(4, 4, 2, stride=(1, 2), padding=(0, 1), groups=2, dtype=torch.float64)
    layer = row.layer(conv, (3, 3), "random")
    if isinstance(layer, Perturbation2d):
        layer.centered = centered
    return layer, torch.randn(1, 4, 3, 3, dtype=torch.float64)


@rows
@forms
def test_gradients(row: MixRow, centered: bool) -> None:
    function, inputs = as_function(*small(row, centered))
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@rows
@forms
def test_second_gradients(row: MixRow, centered: bool) -> None:
    function, inputs = as_function(*small(row, centered))
    assert torch.autograd.gradgradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@forms
def test_chunked_fan_out_has_the_gradients_of_the_plain_formula(act: str, centered: bool) -> None:
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(6, 2 * 3, 1, 1, dtype=torch.float64, requires_grad=True)
    n = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    z = x.unsqueeze(2) + n
    a = ACTIVATIONS[act].function(z) - (n if centered else 0)
    plain = nn.functional.conv2d(a.flatten(1, 2), v, groups=2)
    ours = CF.perturbation(x, v, n, act=act, centered=centered, groups=2)
    weights = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * weights).sum(), (x, v, n))
    got = torch.autograd.grad((ours * weights).sum(), (x, v, n))
    assert naive.error(ours, plain) <= 1e-14
    assert max(naive.error(g, w) for g, w in zip(got, wanted, strict=True)) <= 1e-13


# The torch ops: opcheck, compile, export.


def test_every_op_has_a_row() -> None:
    assert {row.op for row in MIXES} <= set(op_names())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("fanout", "act", "centered", "pool", "masks"),
    [(1, "relu", False, "none", True), (3, "silu", True, "max", True), (1, "relu", True, "avg", True),
     (1, "relu", False, "max", False)],
)  # fmt: skip
def test_opcheck_perturbation(fanout: int, act: str, centered: bool, pool: str, masks: bool, grad: bool) -> None:
    x, v = torch.randn(2, 4, 6, 6), torch.randn(6, 2 * fanout, 1, 1)
    n = torch.randn(4, fanout, 6, 6) if masks else None
    bias = torch.randn(6)
    if grad:
        for tensor in (x, v, bias):
            tensor.requires_grad_()
    window = (2, 2) if pool != "none" else (1, 1)
    op = torch.ops.convsurgery.perturbation2d.default
    torch.library.opcheck(op, (x, v, bias, n, fanout, act, centered, pool, window, window, 2))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_local_binary_conv(grad: bool) -> None:
    x, v, b = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 1, 1), torch.randint(-1, 2, (8, 2, 3, 3)).float()
    if grad:
        x.requires_grad_()
        v.requires_grad_()
    op = torch.ops.convsurgery.local_binary_conv2d.default
    torch.library.opcheck(op, (x, v, None, b, "relu", (2, 1), (1, 1), (1, 2), 2))


@rows
@pytest.mark.parametrize("geometry", ["groups", "reflect", "stride"])
def test_compiled_whole_forward_and_backward(row: MixRow, geometry: str) -> None:
    layer, _, x = make_layer(row, geometry, torch.float32, geometry == "reflect")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for images in (x, torch.cat([x, x])):  # the second with a batch that was not seen before
        wanted, got = gradients(layer, layer, images), gradients(compiled, layer, images)
        assert max(naive.error(g, w) for g, w in zip(got, wanted, strict=True)) <= row.float32 * 10


@rows
@pytest.mark.parametrize("geometry", ["groups", "circular", "stride"])
def test_torch_export_keeps_the_operator_whole(row: MixRow, geometry: str) -> None:
    layer, _, x = make_layer(row, geometry, torch.float32, False)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    ours = [node for node in program.graph.nodes if getattr(node.target, "namespace", "") == "convsurgery"]
    assert [node.target for node in ours] == [getattr(torch.ops.convsurgery, row.op).default]
    more = torch.cat([x, x[:1]])
    assert torch.equal(program.module()(more), layer(more))


# Precision, memory layout, memory.


@rows
@forms
@pytest.mark.parametrize("dtype", REDUCED, ids=str)
def test_autocast(row: MixRow, dtype: torch.dtype, centered: bool) -> None:
    layer, conv, x = make_layer(row, "groups", torch.float32, centered)
    with torch.autocast("cpu", dtype):
        got, wanted_dtype = layer(x), conv(x).dtype
    assert got.dtype == wanted_dtype == dtype
    assert naive.error(got, row.naive(layer, x)) <= getattr(row, str(dtype).removeprefix("torch."))
    got.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@rows
@pytest.mark.parametrize("dtype", REDUCED, ids=str)
def test_half_module_holds_its_masks_in_half(row: MixRow, dtype: torch.dtype) -> None:
    layer, _, x = make_layer(row, "k3", torch.float32, False)
    wanted = row.naive(layer, x)
    half = copy.deepcopy(layer).to(dtype)
    assert {t.dtype for t in (*half.parameters(), *half.buffers())} == {dtype}
    got = half(x.to(dtype))
    assert got.dtype == dtype
    assert naive.error(got, wanted) <= 2 * getattr(row, str(dtype).removeprefix("torch."))


@rows
@pytest.mark.parametrize("geometry", ["groups", "depthwise", "reflect"])
def test_channels_last_gives_the_same_values(row: MixRow, geometry: str) -> None:
    layer, _, x = make_layer(row, geometry, torch.float64, False)
    wanted = gradients(layer, layer, x)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    got = gradients(last, last, x.to(memory_format=torch.channels_last))
    assert max(naive.error(g, w) for g, w in zip(got, wanted, strict=True)) <= row.float64 * 10


def test_fan_out_is_not_materialised(tmp_path: Path) -> None:
    """Beside the output: at most two maps of its size in inference, whatever the number of masks."""
    conv, x = nn.Conv2d(32, 32, 3, padding=1, bias=False), torch.randn(4, 32, 32, 32)
    for fanout in (4, 16):
        layer = MixRow(f"pnn(fanout={fanout})", naive.perturb, "", "").layer(conv, (32, 32))

        def infer(layer: nn.Module = layer) -> Tensor:
            with torch.no_grad():
                return layer(x)

        def train(layer: nn.Module = layer) -> Tensor:
            y = layer(x.detach().requires_grad_())
            y.sum().backward()
            return y

        infer()
        train()
        maps = x.numel()  # as large as the output
        assert peak(infer, tmp_path) <= 3 * maps + 2 * 32 * 32
        assert peak(train, tmp_path) <= 8 * maps + 2 * fanout * 32 * 32


# Masks and filters.


def test_noise_is_the_same_everywhere() -> None:
    """Values written down once: another platform or version that draws others would break saved recipes."""
    layer = Perturbation2d(2, 2, (2, 2), level=1.0, seed=7, stream="layer1.0.conv1", dtype=torch.float64)
    other = Perturbation2d(2, 2, (2, 2), level=1.0, seed=7, stream="x", noise="gaussian", dtype=torch.float64)
    binary = LocalBinaryConv2d(1, 2, (2, 2), seed=7)
    torch.testing.assert_close(layer.masks.flatten()[:4], torch.tensor(UNIFORM, dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(other.masks.flatten()[:4], torch.tensor(NORMAL, dtype=torch.float64), rtol=0, atol=0)
    assert binary.filters.flatten().tolist() == TERNARY


UNIFORM: list[float] = [-0.5324106046956685, -0.8732377600510535, -0.47616540435758714, 0.23695676134789845]
NORMAL: list[float] = [-0.7006988525390625, 0.2892913818359375, 0.38873291015625, -0.59661865234375]
TERNARY: list[float] = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, -1.0]


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_masks_have_their_distribution(noise: str) -> None:
    layer = Perturbation2d(8, 4, 64, level=0.3, noise=noise)
    values = layer.masks.double()
    spread = 0.3 / 3**0.5 if noise == "uniform" else 0.3
    assert abs(float(values.mean())) < 0.01 * spread * 2
    assert abs(float(values.std()) / spread - 1) < 0.02
    if noise == "uniform":
        assert 0.299 < float(values.abs().max()) <= 0.3


def test_masks_depend_on_seed_and_layer_alone() -> None:
    state = torch.get_rng_state()
    masks = {
        (seed, stream): Perturbation2d(2, 2, 4, seed=seed, stream=stream).masks for seed in (0, 1) for stream in "ab"
    }
    again = Perturbation2d(2, 2, 4, seed=1, stream="a").masks
    torch.set_rng_state(state)
    assert torch.equal(again, masks[1, "a"])
    flat = [mask.flatten().tolist() for mask in masks.values()]
    assert len({tuple(values) for values in flat}) == 4


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
def test_filters_have_their_share_of_zeros(sparsity: float) -> None:
    layer = LocalBinaryConv2d(8, 16, 3, filters=64, sparsity=sparsity)
    assert set(layer.filters.unique().tolist()) <= {-1.0, 0.0, 1.0}
    zeros = (layer.filters == 0).flatten(1).sum(1)
    assert set(zeros.tolist()) == {min(int(sparsity * 72), 71)}
    if sparsity < 0.9:
        assert abs(float(layer.filters.mean())) < 0.05


@pytest.mark.parametrize("factor", [0.75, 1.25])
@pytest.mark.parametrize("stride", [1, 2])
def test_masks_are_stretched_to_another_size(factor: float, stride: int) -> None:
    row = MixRow("pnn(fanout=2, trainable=true)", naive.perturb, "", "")
    conv = nn.Conv2d(3, 4, 3, stride, 1, dtype=torch.float64)
    layer = row.layer(conv, (16, 16))
    size = int(16 * factor)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    assert layer(x).shape == conv(x).shape
    assert naive.error(layer(x), row.naive(layer, x)) <= row.float64


@pytest.mark.parametrize("size", [12, 20])
def test_fixed_masks_refuse_another_size(size: int) -> None:
    layer = MixRow("pnn(masks=fixed)", naive.perturb, "", "").layer(nn.Conv2d(3, 4, 3, padding=1), (16, 16))
    with pytest.raises(convsurgery.ConvSurgeryError, match=rf"fixed to maps of \(16, 16\).*\({size}, {size}\)"):
        layer(torch.randn(1, 3, size, size))


# Builds and starts.


@rows
@pytest.mark.parametrize("start", ["default", "random(seed=3)"])
def test_build_keeps_flags_and_the_convolution_itself(row: MixRow, start: str) -> None:
    conv, x = make("stride", torch.float32)
    conv.eval()
    conv.weight.requires_grad_(False)
    before, wanted = copy.deepcopy(conv.state_dict()), conv(x)
    new = row.layer(conv, (x.shape[2], x.shape[3]), None if start == "default" else start)
    assert isinstance(new, OperatorLayer)
    assert not new.training
    assert not new.weight.requires_grad
    assert new.bias.requires_grad
    new(x)
    assert all(torch.equal(conv.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(conv(x), wanted)
    trained = sum(p.numel() for p in new.parameters())
    site_cost = row.config.cost(site_of(conv, x)).params
    assert site_cost == trained


def site_of(conv: nn.Conv2d, x: Tensor) -> Any:
    from convsurgery.geometry import Site

    out = conv(x).shape
    return Site(("conv",), 0, ConvGeometry.of(conv), tuple(x.shape), tuple(out), positions=out[2] * out[3])


@rows
def test_random_start_is_given_by_its_seed_alone(row: MixRow) -> None:
    conv, x = make("k3", torch.float32)
    state = torch.get_rng_state()
    size = (x.shape[2], x.shape[3])
    first, same, other = (row.layer(conv, size, f"random(seed={seed})").weight for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    torch.set_rng_state(state)


@rows
def test_default_start(row: MixRow) -> None:
    config = row.config
    assert config.start_for(None).name in config.starts
    conv, x = make("k3", torch.float32)
    assert config.start_for(None, site_of(conv, x)).name == row.default
    assert config.start_for(None, site_of(conv, x), data=True).name == "fit"


@pytest.mark.parametrize("rule", ["pnn", "pnn(fanout=3, noise=gaussian)", "pnn(shared=true)"])
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"stride": 2}, {"bias": False}], ids=str)
def test_neutral_start_of_a_pointwise_convolution_is_the_convolution(rule: str, options: dict[str, Any]) -> None:
    conv, x = nn.Conv2d(4, 6, 1, **options), 100 * torch.randn(2, 4, 7, 6)
    layer = MixRow(rule, naive.perturb, "", "").layer(conv, (7, 6))
    assert layer.centered
    for dtype in (torch.float32, torch.float16):
        layer, conv, x = layer.to(dtype), conv.to(dtype), x.to(dtype)
        wanted = conv(x)
        if conv.stride != (1, 1):  # the pixels are cut out first, and some CPUs convolve that in another order
            steps = conv.stride
            cut = F.conv2d(x[..., :: steps[0], :: steps[1]], conv.weight, conv.bias)
            torch.testing.assert_close(cut, wanted, rtol=1e-3, atol=1e-3)
            wanted = cut
        assert torch.equal(layer(x), wanted)


def fit(layer: OperatorLayer, conv: nn.Conv2d, x: Tensor, **options: Any) -> tuple[float, Any]:
    """Fit in batches of one image, as streaming data gives them."""
    fitter = layer.fitter(conv, **options)
    while True:
        for image in x.split(1):
            with torch.no_grad():
                fitter.add(image, layer(image), conv(image))
        if (error := fitter.finish()) is not None:
            return error, fitter


def test_fit_of_a_pointwise_convolution_keeps_it_and_stays_near_its_kink() -> None:
    """Exact on the data, and beyond it no longer linear."""
    conv, x = nn.Conv2d(4, 6, 1), torch.randn(8, 4, 7, 6)
    layer = MixRow("pnn", naive.perturb, "", "").layer(conv, (7, 6), "fit")
    error, _ = fit(layer, conv, x)
    assert torch.equal(layer(x), conv(x))
    assert error < 1e-6
    assert not torch.allclose(layer(2 * x), conv(2 * x))
    lowest = -x.transpose(0, 1).flatten(1).amin(1)
    # uniform noise of level 0.1 lies between the lowest value and 0.2 below it
    assert torch.all(layer.masks.amin((1, 2, 3)) >= lowest - 1e-6)
    assert torch.all(layer.masks.amax((1, 2, 3)) <= lowest + 0.2 + 1e-6)


@pytest.mark.parametrize("rule", ["pnn(pool=avg)", "pnn(fanout=2, level=1, pool=avg)", "lbc(filters=12)"])
@pytest.mark.parametrize("groups", [1, 2])
def test_fit_is_the_least_squares_solution(rule: str, groups: int) -> None:
    """Against numpy on the whole of the data at once; the error is what is left."""
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups).double(), torch.randn(8, 4, 9, 9).double()
    layer = bind_layer(rule, conv, x)
    error, _ = fit(layer, conv, x, ridge=1e-12)
    a = layer.features(x).unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3).numpy()
    y = conv(x).detach().unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3).numpy()
    left = []
    for part, target, mix, bias in zip(
        a, y, layer.weight.unflatten(0, (groups, -1)), layer.bias.unflatten(0, (groups, -1)), strict=True
    ):
        ones = np.concatenate([part, np.ones((len(part), 1))], 1)
        solution, *_ = np.linalg.lstsq(ones, target, rcond=None)
        np.testing.assert_allclose(mix.detach().flatten(1).numpy().T, solution[:-1], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(bias.detach().numpy(), solution[-1], rtol=1e-6, atol=1e-7)
        left.append(((target - ones @ solution) ** 2).mean(0) / target.var(0))
    assert abs(error - float(np.concatenate(left).mean()) ** 0.5) < 1e-6


def bind_layer(rule: str, conv: nn.Conv2d, x: Tensor) -> Any:
    # Of a copy, for the layer takes the bias over and changes it.
    return MixRow(rule, naive.perturb, "", "").layer(copy.deepcopy(conv), (x.shape[2], x.shape[3]), "fit")


def test_fit_behind_max_pooling_is_better_than_the_projection() -> None:
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(16, 4, 9, 9).relu()
    layer = bind_layer("pnn", conv, x)
    wanted = conv(x)
    spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3))
    before = ((layer(x) - wanted).square().mean((0, 2, 3)) / spread).mean().sqrt()
    error, _ = fit(layer, conv, x)
    after = ((layer(x) - wanted).square().mean((0, 2, 3)) / spread).mean().sqrt()
    assert after.item() == pytest.approx(error, rel=1e-4)
    assert after < before
    assert after < 1


def test_what_a_layer_without_bias_cannot_hold_is_left_over() -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=1, bias=False), torch.randn(16, 4, 9, 9).relu() + 1
    layer = bind_layer("pnn", conv, x)
    _, fitter = fit(layer, conv, x)
    assert fitter.shift is None
    shifted, fitter = fit(layer, conv, x, shift=True)
    wanted = conv(x)
    left = wanted - layer(x) - fitter.shift.view(-1, 1, 1)
    spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3))
    assert float((left.square().mean((0, 2, 3)) / spread).mean().sqrt()) == pytest.approx(shifted, rel=1e-4)


def test_projection_of_local_binary_filters_is_the_fit_to_white_gaussian_images() -> None:
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(3000, 2, 7, 7)
    layer = MixRow("lbc(filters=8)", naive.local_binary, "", "").layer(conv, (7, 7), "project")
    mix, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    fitted, _ = copy.deepcopy(layer), None
    fit(fitted, conv, x)
    assert naive.error(mix, fitted.weight) < 0.08
    assert naive.error(bias, fitted.bias) < 0.08


def test_white_images_have_no_other_pixel_to_predict_from() -> None:
    """For them the projection of a perturbation layer must find the centre: other pixels decay by distance."""
    conv = nn.Conv2d(2, 3, 3, padding=1)
    layer = MixRow("pnn(fanout=2)", naive.perturb, "", "").layer(conv, (7, 7), "project")
    decay = torch.tensor([[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]])
    wanted = (conv.weight * decay).sum((2, 3)) / 2
    torch.testing.assert_close(layer.weight[:, :, 0, 0], wanted.repeat_interleave(2, 1), rtol=1e-6, atol=1e-7)


# State, fusing, printing, functional forms.


@rows
def test_copies_share_nothing(row: MixRow) -> None:
    layer, _, x = make_layer(row, "k3", torch.float64, False)
    twin, wanted = copy.deepcopy(layer), layer(x).detach().clone()
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.fill_(0.3)
    assert torch.equal(layer(x), wanted)
    assert not torch.equal(twin(x), wanted)


@rows
@pytest.mark.parametrize("geometry", ["groups", "circular-same", "depthwise"])
def test_fused_layer_computes_the_same(row: MixRow, geometry: str) -> None:
    layer, conv, x = make_layer(row, geometry, torch.float64, False)
    wanted = layer(x).detach()
    fused = layer.fold()
    assert torch.equal(fused(x), wanted)
    assert not any(p.requires_grad for p in fused.parameters())
    gain, bias = (torch.linspace(low, 2, conv.out_channels).double() for low in (-0.5, -1))
    held = fused.absorb_affine(gain, bias)
    assert held == (not (isinstance(layer, Perturbation2d) and layer.pools and layer.pool == "max"))
    if held:
        assert naive.error(fused(x), wanted * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)) <= row.float64 * 2
    else:
        assert torch.equal(fused(x), wanted)
    assert torch.equal(layer(x), wanted)


@rows
def test_config_and_rule_are_the_same(row: MixRow) -> None:
    config = row.config
    assert bind(parse_target(str(config))) == config
    assert bind(config.to_target()) == config
    for text in (config.summary, config.formula, config.source):
        assert text


@rows
def test_functional_form_is_the_layer(row: MixRow) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    layer = row.layer(conv, (6, 6), "random")
    for images in (x, x[0]):
        if isinstance(layer, Perturbation2d):
            got = CF.perturbation(images, layer.weight, layer.masks, layer.bias, act=layer.act, groups=2)
        elif isinstance(layer, LinearMix2d):
            got = CF.linear_mix(images, layer.weight, layer.mix, layer.bias, padding=1, groups=2)
        else:
            got = CF.local_binary_conv(
                images, layer.weight, layer.filters, layer.bias, padding=1, groups=2, act=layer.act
            )
        assert torch.equal(got, layer(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "rlu"}, "unknown activation 'rlu'"),
        ({"pool": "min"}, "pool must be none, max or avg"),
        ({"masks": torch.randn(3, 1, 6, 5)}, r"masks of shape \(3, 1, 6, 5\) do not fit images of 4 channels"),
        ({"fanout": 2}, "fanout=2, but there are 1 masks for each channel"),
        ({"weight": torch.randn(6, 5, 1, 1)}, "weight mixes 5 maps, there are 4 channels x 1 masks"),
    ],
)
def test_functional_form_refuses(change: dict[str, Any], message: str) -> None:
    given = {"weight": torch.randn(6, 4, 1, 1), "masks": torch.randn(4, 1, 6, 6), **change}
    with pytest.raises(ValueError, match=message):
        CF.perturbation(torch.randn(1, 4, 6, 6), **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Perturbation2d(4, 6, 8, level=0), "level above 0"),
        (lambda: Perturbation2d(4, 6, 8, noise="white"), "noise must be one of"),
        (lambda: Perturbation2d(4, 6, 8, 3, stride=2, padding="same"), "padding='same' is not supported"),
        (lambda: LocalBinaryConv2d(4, 6, 3, sparsity=1.0), "sparsity must be from 0 to below 1"),
        (lambda: LocalBinaryConv2d(4, 6, 3, groups=2, filters=3), "divisible by groups"),
    ],
)
def test_layers_refuse(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ONNX.

VARIANTS: tuple[tuple[dict[str, Any], bool], ...] = (
    ({"kernel_size": 3, "padding": 1}, False),
    ({"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2, "bias": False}, False),
    ({"kernel_size": (2, 3), "padding": "same"}, True),
    ({"kernel_size": 1, "stride": (2, 1)}, True),
    ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "groups": 4, "out_channels": 4}, False),
)


def variants(row: MixRow) -> Side:
    layers = []
    for options, centered in VARIANTS:
        layer = row.layer(nn.Conv2d(4, **{"out_channels": 6, **options}), (7, 6), "random")
        if isinstance(layer, Perturbation2d):
            layer.centered = centered
        layers.append(layer)
    return Side(layers)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 4, 7, 6, generator=torch.Generator().manual_seed(batch))


@rows
@pytest.mark.parametrize("inline", [False, True], ids=["functions", "inlined"])
def test_onnxruntime_computes_the_formula(row: MixRow, inline: bool, tmp_path: Path) -> None:
    if "fixed" in row.rule:
        row = MixRow(row.rule.replace(", masks=fixed", ""), row.naive, row.op, row.op_type)
    model, path = variants(row), tmp_path / "model.onnx"
    convsurgery.export_onnx(model, path, inline=inline, example_inputs=images(2), tolerance=1e-5)
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    nodes = custom(proto)
    assert [node.op_type for node in nodes] == ([] if inline else [row.op_type] * len(VARIANTS))
    everything = [*all_nodes(proto.graph), *(node for function in proto.functions for node in all_nodes(function))]
    assert not {node.op_type for node in everything} & PATCH_OPS
    assert {node.domain for node in everything} <= {"", "ai.onnx", "ai.convsurgery"}
    if inline:
        assert not proto.functions
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = images(batch)
        (got,) = session.run(None, {"input": x.numpy()})
        parts = [row.naive(layer, x).flatten(1) for layer in model.layers]
        columns = np.split(got, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
        for column, part, variant in zip(columns, parts, VARIANTS, strict=True):
            assert naive.error(torch.from_numpy(column), part) <= row.onnx, variant


def test_every_activation_in_onnx(tmp_path: Path) -> None:
    conv = nn.Conv2d(4, 4, 1)
    names = sorted(ACTIVATIONS)
    layers = [
        MixRow(f"pnn(act={name}, level=2)", naive.perturb, "", "").layer(conv, (7, 6), "random") for name in names
    ]
    model, path = Side(layers), tmp_path / "model.onnx"
    convsurgery.export_onnx(model, path, example_inputs=images(2))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = images(2)
    (got,) = session.run(None, {"input": x.numpy()})
    for name, layer, column in zip(names, layers, np.split(got, len(names), axis=1), strict=True):
        assert naive.error(torch.from_numpy(column), naive.perturb(layer, x).flatten(1)) <= 3e-6, name


def test_masks_are_in_the_file_once(tmp_path: Path) -> None:
    layer = MixRow("pnn(fanout=2)", naive.perturb, "", "").layer(nn.Conv2d(16, 16, 3, padding=1), (32, 32), "random")
    for inline in (False, True):
        path = tmp_path / f"{inline}.onnx"
        convsurgery.export_onnx(layer, path, inline=inline, example_inputs=torch.randn(2, 16, 32, 32))
        masks = layer.masks.numel() * 4
        assert masks < path.stat().st_size < 1.2 * masks


# Rules.


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("pnn(level=0)", "level wants a number > 0, not 0"),
        ("pnn(level=-1)", "level wants a number > 0, not -1"),
        ("pnn(masks=some)", "masks wants an integer >= 1 or resize or fixed, not some"),
        ("pnn(masks=8, fanout=2)", "give one of the two"),
        ("pnn(act=rlu)", "act wants"),
        ("pnn(noise=white)", "noise wants uniform or gaussian or none, not white"),
        ("lbc(sparsity=1)", "sparsity wants a number >= 0 and below 1, not 1"),
        ("lbc(filters=0)", "filters wants an integer >= 1"),
    ],
)
def test_bad_arguments(rule: str, message: str) -> None:
    with pytest.raises(convsurgery.ConvSurgeryError, match=message):
        bind(parse_target(rule))


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("pnn(masks=10)", "masks=10 is no multiple of its 4 input channels; nearest: 8 or 12"),
        ("pnn(masks=3)", "masks=3 is no multiple of its 4 input channels; nearest: 4"),
        ("pnn(fanout=64, budget=1)", r"its masks, 4 x 64 x 64 x 64 values, take 4 MiB; budget=1"),
        ("lbc(filters=7)", "filters=7 is no multiple of its 2 groups; nearest: 6 or 8"),
    ],
)
def test_where_they_cannot_stand(rule: str, reason: str) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    assert bind(parse_target(rule)).refuses(site_of(conv, torch.empty(1, 4, 64, 64))) == reason


def test_pads_and_strides_keep_to_pairs() -> None:
    layer = Perturbation2d(4, 6, (9, 12), (3, 5), (2, 3), (1, 2))
    assert pair(layer.stride) == (2, 3)
    x = torch.randn(1, 4, 9, 12)
    assert layer(x).shape == nn.Conv2d(4, 6, (3, 5), (2, 3), (1, 2))(x).shape
    assert "max pooling of (2, 3)" in repr(layer)
