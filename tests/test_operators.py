"""The generic battery over ``operator_table``: what every operator must hold, whatever it computes."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import naive
import pytest
import torch
from operator_table import KERVOLUTIONS, LEARNABLE, NEUTRAL, TABLE, Row, operators_without_row
from torch import Tensor, nn

import convsurgery
import convsurgery.functional as CF
from convsurgery.errors import ArgumentError, ConvSurgeryError, RuleError
from convsurgery.geometry import ConvGeometry, Site
from convsurgery.operators import (
    Built,
    KervGauss,
    KervPoly,
    OperatorConfig,
    Start,
    base,
    bind,
    list_operators,
    option,
    register_operator,
)
from convsurgery.operators.kervolution import Kervolution2d, l1
from convsurgery.rules import parse_target

REDUCED = (torch.bfloat16, torch.float16)

#: Conv2d options and the size of an image
GEOMETRIES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "k3": ({"kernel_size": 3}, (7, 6)),
    "k1": ({"kernel_size": 1}, (4, 5)),
    "k1-stride": ({"kernel_size": 1, "stride": 2}, (5, 5)),
    "even-same": ({"kernel_size": (2, 4), "padding": "same"}, (5, 6)),
    "even-numbers": ({"kernel_size": 2, "padding": 1}, (5, 6)),
    "valid-no-bias": ({"kernel_size": 3, "padding": "valid", "bias": False}, (5, 5)),
    "stride": ({"kernel_size": 3, "stride": (2, 1), "padding": (1, 0)}, (7, 8)),
    "dilation": ({"kernel_size": (3, 2), "dilation": (1, 3), "padding": 2}, (6, 6)),
    "dilation-same": ({"kernel_size": (2, 3), "dilation": (3, 2), "padding": "same"}, (6, 7)),
    "groups": ({"kernel_size": 3, "groups": 2, "stride": 2, "padding": 1, "bias": False}, (7, 7)),
    "depthwise": ({"out_channels": 4, "kernel_size": 3, "groups": 4, "padding": "same"}, (5, 5)),
    "depthwise-multiplied": ({"out_channels": 8, "kernel_size": 3, "groups": 4, "dilation": 2}, (7, 8)),
    "reflect": ({"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}, (5, 6)),
    "replicate": ({"kernel_size": 3, "padding": 2, "stride": 2, "padding_mode": "replicate"}, (5, 6)),
    "circular": ({"kernel_size": 3, "padding": 1, "groups": 2, "padding_mode": "circular"}, (5, 6)),
    "circular-same": ({"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"}, (5, 6)),
}
FORMS = ("paper", "plain", "centered")
#: every form of every row that has it
ROWS_IN_FORMS = [(row, form) for row in KERVOLUTIONS for form in (*FORMS, *(["dialled"] if row.neutral else []))]


def ids(values: Any) -> list[str]:
    return [str(value) for value in values]


all_rows = pytest.mark.parametrize("row", TABLE, ids=ids(TABLE))
kervolutions = pytest.mark.parametrize("row", KERVOLUTIONS, ids=ids(KERVOLUTIONS))
neutral_rows = pytest.mark.parametrize("row", NEUTRAL, ids=ids(NEUTRAL))
learnable_rows = pytest.mark.parametrize("row", LEARNABLE, ids=ids(LEARNABLE))
in_forms = pytest.mark.parametrize(("row", "form"), ROWS_IN_FORMS, ids=[f"{row}-{form}" for row, form in ROWS_IN_FORMS])
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


@pytest.fixture(autouse=True)
def one_thread_and_one_seed() -> Iterator[None]:
    """Such small tensors are many times slower where threads wait for a shared core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make(geometry: str = "k3", dtype: torch.dtype = torch.float64) -> tuple[nn.Conv2d, Tensor]:
    """A convolution of 4 channels and two images for it."""
    options, size = GEOMETRIES[geometry]
    conv = nn.Conv2d(4, **{"out_channels": 6, **options}, dtype=dtype)
    return conv, torch.randn(2, 4, *size, dtype=dtype)


def make_layer(row: Row, conv: nn.Conv2d, form: str) -> nn.Module:
    """In the paper's own form, or with all constants given."""
    if form == "dialled":
        return row.dialled(conv)
    if form == "start":
        return row.layer(conv, "neutral")
    return row.layer(conv) if form == "paper" else row.full(conv, centered=form == "centered")


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters, and those constants that a gradient can reach, as leaves."""
    named = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {name: t.detach().clone().requires_grad_() for name, t in named.items()}


# The table and the formulas.


def test_an_operator_without_a_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newcomer(OperatorConfig):
        __module__ = "convsurgery.operators.newcomer"

    monkeypatch.setattr(base, "_registry", dict(base._registry))
    register_operator("newcomer")(Newcomer)
    assert operators_without_row(list_operators()) == ["newcomer"]


def test_every_start_and_every_kernel_of_the_package_is_in_the_table() -> None:
    assert {row.config.name for row in NEUTRAL} == {
        name for name in list_operators() if "neutral" in base.operator(name).starts and name.startswith("kerv-")
    }
    functional = [name.replace("_", "-") for name in CF.__all__ if name.startswith("kerv_")]
    dialled = {name.removesuffix("-dial") for name in functional if name.endswith("-dial")}
    assert {name for name in functional if not name.endswith("-dial")} == {row.config.name for row in KERVOLUTIONS}
    assert dialled == {row.config.name for row in NEUTRAL}


@in_forms
@geometries
def test_formula(row: Row, geometry: str, form: str) -> None:
    conv, x = make(geometry)
    layer = make_layer(row, conv, form)
    for images in (x, x[0]):
        assert naive.error(layer(images), row.naive(layer, images)) <= row.float64
    with torch.no_grad():  # without a tape the kernels overwrite their temporaries
        before = x.clone()
        assert naive.error(layer(x), row.naive(layer, x)) <= row.float64
        assert torch.equal(x, before)


@in_forms
def test_formula_in_float32(row: Row, form: str) -> None:
    conv, x = make("groups", torch.float32)
    layer = make_layer(row, conv, form)
    assert layer(x).dtype == torch.float32
    assert naive.error(layer(x), row.naive(layer, x)) <= row.float32


@geometries
def test_null_operator_is_the_convolution_bit_for_bit(geometry: str) -> None:
    (row,) = (row for row in TABLE if row.kernel is None)
    conv, x = make(geometry, torch.float32)
    new = row.layer(conv)
    assert type(new) is nn.Conv2d
    assert new is not conv
    assert torch.equal(new(x), conv(x))


@kervolutions
def test_an_empty_batch(row: Row) -> None:
    conv, x = make()
    assert row.layer(conv)(x[:0]).shape == conv(x[:0]).shape


@kervolutions
@pytest.mark.parametrize("channels", [3, 5])
def test_input_with_other_channels_is_refused(row: Row, channels: int) -> None:
    conv, _ = make()
    with pytest.raises((RuntimeError, ValueError), match="channels"):
        row.layer(conv)(torch.randn(2, channels, 7, 7, dtype=torch.float64))


@kervolutions
def test_image_smaller_than_the_window_is_refused(row: Row) -> None:
    conv, x = make()
    layer = row.layer(conv)
    layer.stride = (3, 3)  # rounding down would make the negative size a 0
    with pytest.raises((RuntimeError, ValueError), match="size"):
        layer(x[..., :2, :2])


# Gradients.


def small(row: Row, form: str) -> tuple[nn.Module, Tensor]:
    conv = nn.Conv2d(4, 4, 2, stride=(1, 2), padding=(0, 1), groups=2, dtype=torch.float64)
    return make_layer(row, conv, form), torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)


def as_function(layer: nn.Module, x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The layer as a function of its input, parameters and constants."""
    named = tensors(layer)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(named, values, strict=True)), (x,))

    return function, (x, *named.values())


@in_forms
def test_gradients(row: Row, form: str) -> None:
    function, inputs = as_function(*small(row, form))
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("row", "form"), [(row, form) for row, form in ROWS_IN_FORMS if row.twice], ids=str)
def test_second_gradients(row: Row, form: str) -> None:
    function, inputs = as_function(*small(row, form))
    assert torch.autograd.gradgradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize(
    ("row", "form"),
    [(row, form) for row, form in [*ROWS_IN_FORMS, *((r, "start") for r in NEUTRAL)] if row.twice],
    ids=str,
)
def test_functional_transforms(row: Row, form: str) -> None:
    """Gradients of each image alone, by vmap, and forward derivatives."""
    conv, x = make("groups")
    layer = make_layer(row, conv, form)
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (image,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for number, image in enumerate(x):
        layer.zero_grad()
        layer(image).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert naive.error(each[name][number], parameter.grad) < 1e-11
    layer.requires_grad_(False)
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(layer, (x,), (tangent,))
    step = 1e-6
    assert naive.error(forward, (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step)) < 1e-7


@pytest.mark.parametrize("row", [row for row in KERVOLUTIONS if not row.twice], ids=str)
def test_second_gradient_that_does_not_exist_raises(row: Row) -> None:
    """It must not come out as zero in silence."""
    layer, x = small(row, "paper")

    def differentiate_twice() -> None:
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(first.square().sum(), x)

    with pytest.raises(RuntimeError, match=f"{row.op}|_backward|no_grad mode"):
        differentiate_twice()


@pytest.mark.parametrize("form", ["paper", "centered"])
def test_gradient_of_the_l2_distance_is_finite_where_it_is_zero(form: str) -> None:
    """There the derivative of the root is infinite; 0 is the value of least harm."""
    w = torch.zeros(2, 1, 2, 2) if form == "centered" else torch.ones(2, 1, 2, 2)
    weight, x = w.clone().requires_grad_(), w[:1].clone().requires_grad_()
    y = CF.kerv_l2(x, weight, centered=form == "centered")
    assert torch.equal(y, torch.zeros(1, 2, 1, 1))
    y.sum().backward()
    for gradient in (x.grad, weight.grad):
        assert torch.isfinite(gradient).all()
    assert form == "centered" or not x.grad.any()


# The torch ops: opcheck, compile, export.


def op_names() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.partition("::")[2] for name in names if name.startswith("convsurgery::"))


def kernel_ops() -> list[str]:
    return [name for name in op_names() if name.startswith(("kerv_", "l1_"))]


def op_arguments(op: Any, **changes: Any) -> tuple[Any, ...]:
    """Arguments for an op by their names in its schema."""
    values = {
        "input": torch.randn(2, 4, 5, 6),
        "weight": torch.randn(6, 2, 3, 2),
        "bias": None,
        "balance": torch.tensor(1.5),
        "gamma": torch.tensor(0.1),
        "kappa": torch.tensor(2.0),
        "epsilon": torch.tensor(0.0),
        "gain": None,
        "scale": None,
        "degree": 3,
        "centered": False,
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 2,
        **changes,
    }
    if "grad" in (names := [argument.name for argument in op._schema.arguments]):
        window = (values[name] for name in ("stride", "padding", "dilation"))
        conv = torch.nn.functional.conv2d(values["input"], values["weight"], None, *window, values["groups"])
        values["grad"] = torch.randn_like(conv)
        values["input"], values["weight"] = values["input"].detach(), values["weight"].detach()
    return tuple(values[name] for name in names)


def op_samples() -> dict[str, dict[str, Any]]:
    return {
        "bare": {},
        "given": {
            "input": torch.randn(1, 4, 6, 5, requires_grad=True),
            "weight": torch.randn(6, 2, 2, 3, requires_grad=True),
            "bias": torch.randn(6, requires_grad=True),
            "balance": torch.linspace(0.5, 2, 6).requires_grad_(),
            "gamma": torch.linspace(0.05, 0.2, 6).requires_grad_(),
            "kappa": torch.linspace(1, 4, 6).requires_grad_(),
            "epsilon": torch.linspace(0, 0.5, 6).requires_grad_(),
            "gain": torch.linspace(-1, 2, 6),
            "scale": torch.tensor(0.5),
            "centered": True,
            "stride": (2, 1),
            "padding": (1, 2),
            "dilation": (1, 2),
        },
        "one-group": {
            "input": torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last),
            "weight": torch.randn(5, 3, 1, 1, dtype=torch.float64, requires_grad=True),
            "balance": torch.tensor(1.5, dtype=torch.float64),
            "gamma": torch.tensor(0.1, dtype=torch.float64),
            "kappa": torch.tensor(2.0, dtype=torch.float64),
            "epsilon": torch.tensor(0.25, dtype=torch.float64),
            "gain": torch.tensor(2.0, dtype=torch.float64),
            "scale": torch.linspace(0.5, 2, 5, dtype=torch.float64),
            "degree": 2,
            "groups": 1,
        },
    }


@pytest.mark.parametrize("name", kernel_ops())
@pytest.mark.parametrize("sample", ["bare", "given", "one-group"])
def test_opcheck(name: str, sample: str) -> None:
    op = getattr(torch.ops.convsurgery, name).default
    torch.library.opcheck(op, op_arguments(op, **op_samples()[sample]))


def test_every_row_names_an_op_that_exists() -> None:
    ops = set(kernel_ops())
    dialled = {f"{row.op}_dial" for row in NEUTRAL}
    assert {row.op for row in KERVOLUTIONS} | dialled == ops - {"l1_distance", "l1_distance_backward"}


def gradients(layer: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    return found


@pytest.mark.parametrize(("row", "form"), [(row, form) for row, form in ROWS_IN_FORMS if form != "plain"], ids=str)
def test_compiled_whole_forward_and_backward(row: Row, form: str) -> None:
    conv, x = make("groups" if form == "paper" else "reflect", torch.float32)
    layer = make_layer(row, conv, form)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for images in (x, torch.cat([x, x])):  # the second with a batch that was not seen before
        wanted, got = gradients(layer, layer, images), gradients(compiled, layer, images)
        assert max(naive.error(g, w) for g, w in zip(got, wanted, strict=True)) <= row.float32 * 10
    with torch.no_grad():
        assert naive.error(compiled(x), layer(x)) <= row.float32 * 10


def test_compiled_by_inductor() -> None:
    """An operator made of torch ops, and the one with a kernel of its own, in one graph."""
    rows = {row.rule: row for row in KERVOLUTIONS}
    x = torch.randn(2, 4, 6, 6)
    first = rows["kerv-poly"].full(nn.Conv2d(4, 6, 3, padding=1), centered=True)
    model = nn.Sequential(first, rows["kerv-l1"].layer(nn.Conv2d(6, 4, 3)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    pairs = zip(gradients(compiled, model, x), gradients(model, model, x), strict=True)
    assert max(naive.error(got, wanted) for got, wanted in pairs) <= 1e-5


CONSTANT_FORMS = [(row, form) for row, form in ROWS_IN_FORMS if form in ("centered", "dialled")]


@pytest.mark.parametrize(("row", "form"), [*ROWS_IN_FORMS, *((row, "start") for row in NEUTRAL)], ids=str)
@pytest.mark.parametrize("geometry", ["groups", "circular", "even-same"])
def test_torch_export_keeps_the_operator_whole(row: Row, form: str, geometry: str) -> None:
    conv, x = make(geometry, torch.float32)
    layer = make_layer(row, conv, form)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    ours = [node for node in program.graph.nodes if getattr(node.target, "namespace", "") == "convsurgery"]
    name = f"{row.op}_dial" if form in ("dialled", "start") else row.op
    assert [node.target for node in ours] == [getattr(torch.ops.convsurgery, name).default]
    assert not [node for node in program.graph.nodes if "conv2d" in str(node.target)]
    more = torch.cat([x, x[:1]])
    assert torch.equal(program.module()(more), layer(more))


# Precision and memory layout.


@in_forms
@pytest.mark.parametrize("dtype", REDUCED, ids=str)
def test_autocast(row: Row, form: str, dtype: torch.dtype) -> None:
    conv, x = make("groups", torch.float32)
    layer = make_layer(row, conv, form)
    with torch.autocast("cpu", dtype):
        got, wanted_dtype = layer(x), conv(x).dtype
    assert got.dtype == wanted_dtype == dtype
    assert torch.isfinite(got).all()
    assert naive.error(got, row.naive(layer, x)) <= getattr(row, str(dtype).removeprefix("torch."))
    got.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@kervolutions
@pytest.mark.parametrize("dtype", REDUCED, ids=str)
@pytest.mark.parametrize("start", ["copy", "default"])
def test_half_module_keeps_its_constants_and_what_it_computes(row: Row, dtype: torch.dtype, start: str) -> None:
    conv, x = make("k3", torch.float32)
    config = row.config
    layer = config.build(conv, config.start_for(None if start == "default" else Start(start)), absorb=False).module
    wanted = row.naive(layer, x)
    half = copy.deepcopy(layer).to(dtype)
    assert {p.dtype for name, p in half.named_parameters() if not name.startswith("log_")} == {dtype}
    assert all(buffer.dtype == torch.float32 for buffer in half.buffers())
    got = half(x.to(dtype))
    assert got.dtype == dtype
    # Weights and images are rounded too: twice the bound of autocast, which rounds them in the same way.
    assert naive.error(got, wanted) <= 2 * getattr(row, str(dtype).removeprefix("torch."))
    assert half.double()(x.double()).dtype == torch.float64


@kervolutions
def test_double_module_has_constants_in_double(row: Row) -> None:
    conv, x = make("k3", torch.float32)
    layer = row.full(conv, centered=True).double()
    assert all(buffer.dtype == torch.float64 for buffer in layer.buffers())
    assert naive.error(layer(x.double()), row.naive(layer, x)) <= row.float64


@in_forms
@pytest.mark.parametrize("geometry", ["groups", "depthwise", "reflect"])
def test_channels_last_gives_the_same_values(row: Row, form: str, geometry: str) -> None:
    conv, x = make(geometry)
    layer = make_layer(row, conv, form)
    wanted = gradients(layer, layer, x)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    got = gradients(last, last, x.to(memory_format=torch.channels_last))
    assert max(naive.error(g, w) for g, w in zip(got, wanted, strict=True)) <= row.float64 * 10


# Memory.


def peak(function: Callable[[], Any], tmp_path: Any) -> int:
    """Most values (of 4 bytes) that ``function`` holds at one time beside what was there before.

    From the allocator, so that temporaries inside an op count as well; a dispatch mode would not see them.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    held, most = 0, 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    assert kept is not None
    assert most > 0
    return most // 4


@pytest.mark.parametrize(("row", "form"), CONSTANT_FORMS, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_no_patch_matrix_is_made(row: Row, form: str, train: bool, tmp_path: Any) -> None:
    """Everything that is alive at one time together is smaller than the patch matrix alone would be."""
    conv, x = nn.Conv2d(32, 8, 3, padding=1), torch.randn(2, 32, 64, 64)
    layer = make_layer(row, conv, form)
    patch_matrix = x.numel() * 9

    def run() -> Tensor:
        if not train:
            with torch.no_grad():
                return layer(x)
        y = layer(x.requires_grad_())
        y.sum().backward()
        return y

    run()  # gradients and caches of the convolution itself are then there
    assert peak(run, tmp_path) < patch_matrix
    columns = peak(lambda: torch.nn.functional.unfold(x, 3, padding=1), tmp_path)
    assert columns >= patch_matrix, "the measurement is blind"


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_l1_works_on_one_block_whatever_the_size(train: bool, tmp_path: Any) -> None:
    """Input, output and their gradients grow with the shape; what comes on top is a few blocks."""
    for channels, filters, size, window in ((16, 8, 32, 3), (16, 64, 32, 3), (16, 8, 64, 3), (16, 8, 32, 5)):
        conv, x = nn.Conv2d(channels, filters, window), torch.randn(1, channels, size, size)
        layer = next(row for row in KERVOLUTIONS if row.rule == "kerv-l1").layer(conv)
        shapes = x.numel() + layer(x).numel()

        def run(layer: nn.Module = layer, x: Tensor = x) -> Tensor:
            if not train:
                with torch.no_grad():
                    return layer(x)
            y = layer(x.requires_grad_())
            y.sum().backward()
            return y

        run()
        rows_of_distances = l1.BLOCK // (channels * window**2) * filters
        assert peak(run, tmp_path) <= 3 * shapes + 4 * (l1.BLOCK + rows_of_distances)


# Hyperparameters.


@kervolutions
def test_hyperparameter_after_a_copy_start(row: Row) -> None:
    conv, _ = make("groups", torch.float32)
    layer = row.layer(conv)
    assert bool(layer.hyper_name) == (row.hyper is not None)
    if row.hyper is None:
        return
    wanted = torch.tensor(row.hyper(2 * 3 * 3)).expand(6 if row.learnable == "channel" else ())
    torch.testing.assert_close(layer.hyper(), wanted, rtol=1e-6, atol=0)
    trained = [name for name, _ in layer.named_parameters() if name not in ("weight", "bias")]
    assert trained == ([f"log_{layer.hyper_name}"] if row.learnable else [])
    cost = row.config.cost(make_site(conv)).params
    assert cost == sum(p.numel() for p in layer.parameters())


def make_site(conv: nn.Conv2d) -> Site:
    return Site(("conv",), 0, ConvGeometry.of(conv), (2, conv.in_channels, 7, 7), (2, conv.out_channels, 4, 4))


@learnable_rows
def test_hyperparameter_stays_positive_under_wild_steps(row: Row) -> None:
    conv, x = make("k3", torch.float32)
    layer = row.layer(conv)
    parameter = getattr(layer, f"log_{layer.hyper_name}")
    layer(x).sum().backward()
    assert parameter.grad.abs().min() > 0
    seen = [layer.hyper().detach().clone()]
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    for step in (9.0, 9.0, -13.0, -13.0):  # without the logarithm the first of them would go below 0
        parameter.grad = torch.full_like(parameter, step)
        optimiser.step()
        assert (layer.hyper() > 0).all()
        assert not any(torch.equal(layer.hyper(), old) for old in seen)
        assert torch.isfinite(layer(x)).all()
        seen.append(layer.hyper().detach().clone())


@learnable_rows
def test_learnable_hyperparameter_is_learned(row: Row) -> None:
    conv, x = make("k3")
    layer, target = row.layer(conv), row.layer(copy.deepcopy(conv))
    parameter, goal = (getattr(each, f"log_{each.hyper_name}") for each in (layer, target))
    goal.data += 0.1
    optimiser = torch.optim.Adam([parameter], lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        (layer(x) - target(x).detach()).square().mean().backward()
        optimiser.step()
    torch.testing.assert_close(parameter, goal, rtol=0, atol=0.02)


# State, copies, and what a build keeps.


@kervolutions
@pytest.mark.parametrize("built_by", FORMS)
@pytest.mark.parametrize("stored_by", [*FORMS, "scalars"])
def test_state_dict_decides_which_constants_there_are(row: Row, stored_by: str, built_by: str) -> None:
    conv, x = make("groups")
    stored = make_layer(row, conv, "paper" if stored_by == "scalars" else stored_by)
    if stored_by == "scalars":
        stored.scale, stored.gain = stored.constant(0.5), stored.constant(2.0)
    other = make_layer(row, nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False, dtype=torch.float64), built_by)
    other.centered = stored.centered  # an option, not state
    other.load_state_dict(stored.state_dict())
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in stored.state_dict().items()}
    assert torch.equal(other(x), stored(x))


@neutral_rows
def test_neutral_layer_survives_saving_and_loading(row: Row) -> None:
    conv, x = make("k3", torch.float32)
    layer = row.layer(conv, "neutral")
    other = row.layer(nn.Conv2d(4, 6, 3), "neutral")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@in_forms
def test_copies_share_nothing(row: Row, form: str) -> None:
    conv, x = make()
    layer = make_layer(row, conv, form)
    twin, wanted = copy.deepcopy(layer), layer(x).detach().clone()
    assert torch.equal(twin(x), wanted)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.fill_(0.3)
    assert torch.equal(layer(x), wanted)
    assert not torch.equal(twin(x), wanted)


@all_rows
@pytest.mark.parametrize("start", ["default", "copy", "random(seed=3)"])
def test_build_keeps_parameters_flags_and_the_convolution_itself(row: Row, start: str) -> None:
    conv, x = make("stride", torch.float32)
    conv.eval()
    conv.weight.requires_grad_(False)
    before, wanted = copy.deepcopy(conv.state_dict()), conv(x)
    config = row.config
    new = config.build(conv, config.start_for(None if start == "default" else Start.parse(start)), absorb=False).module
    assert not new.training
    assert not new.weight.requires_grad
    assert new.bias.requires_grad
    assert (new.weight is conv.weight) == (new.bias is conv.bias) == (not start.startswith("random"))
    assert (new.weight.dtype, new.weight.shape) == (conv.weight.dtype, conv.weight.shape)
    assert ConvGeometry.of(new) == ConvGeometry.of(conv)
    new(x)
    assert all(torch.equal(conv.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(conv(x), wanted)
    # What is learned besides is trained exactly where the weights are.
    learned = [p for name, p in new.named_parameters() if name.startswith("log_")]
    assert len(learned) == bool(row.learnable)
    assert not any(p.requires_grad for p in learned)
    assert conv.train() is conv
    assert config.build(conv, Start("copy"), absorb=False).module.training


@all_rows
def test_random_start_is_given_by_its_seed_alone(row: Row) -> None:
    conv, _ = make("k3", torch.float32)
    state = torch.get_rng_state()
    first, same, other = (row.layer(conv, f"random(seed={seed})").weight for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    bound = 1 / math.sqrt(4 * 9)  # nn.Conv2d's own
    assert 0.9 * bound < first.abs().max() <= bound


@pytest.mark.parametrize(("row", "form"), [*ROWS_IN_FORMS, *((row, "default start") for row in KERVOLUTIONS)], ids=str)
@pytest.mark.parametrize("geometry", ["groups", "circular-same"])
def test_fused_layer_computes_the_same(row: Row, form: str, geometry: str) -> None:
    conv, x = make(geometry)
    if form == "default start":
        layer = row.config.build(conv, row.config.start_for(None), absorb=False).module
    else:
        layer = make_layer(row, conv, form)
    wanted = layer(x)
    fused = layer.fuse()
    assert naive.error(fused(x), wanted) <= row.float64
    assert fused.scale is None
    assert fused.offset is None
    assert not any(p.requires_grad for p in fused.parameters())
    assert torch.equal(layer(x), wanted)
    gain, bias = torch.linspace(0.5, 2, 6).double(), torch.linspace(-1, 1, 6).double()
    fused.absorb_affine(gain, bias)
    assert naive.error(fused(x), wanted * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)) <= row.float64 * 2


@kervolutions
def test_repr_tells_the_options(row: Row) -> None:
    conv, _ = make("circular-same", torch.float32)
    text = repr(row.layer(conv))
    for part in ("4, 6", "kernel_size=(4, 3)", "padding=same", "padding_mode=circular"):
        assert part in text
    assert ("learnable" in text) == bool(row.learnable)
    assert "centered" in repr(row.full(conv, centered=True))
    if row.neutral:
        assert "eps=0.125" in repr(row.layer(conv, "neutral(0.125)"))
        assert "eps=per channel" in repr(row.dialled(conv))


# Functional forms.


@kervolutions
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)])
def test_functional_form_is_the_layer(row: Row, padding: Any) -> None:
    conv = nn.Conv2d(4, 6, (2, 3), padding=padding, groups=2, dtype=torch.float64)
    x, layer = torch.randn(2, 4, 6, 6, dtype=torch.float64), row.full(conv, centered=True)
    layer.offset = None
    options = {"gain": layer.gain, "scale": layer.scale}
    if row.hyper is not None:
        options[layer.hyper_name] = layer.hyper()
    if row.op == "kerv_poly":
        options["degree"] = layer.degree
    if row.op in ("kerv_linear", "kerv_sigmoid"):
        layer.centered = False
    else:
        options["centered"] = True
    function = getattr(CF, row.op)
    for images in (x, x[0]):
        got = function(images, layer.weight, layer.bias, 1, padding, 1, 2, **options)
        assert torch.equal(got, layer(images))


@neutral_rows
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)])
def test_functional_dialled_form_is_the_layer(row: Row, padding: Any) -> None:
    conv = nn.Conv2d(4, 6, (2, 3), padding=padding, groups=2, dtype=torch.float64)
    x, layer = torch.randn(2, 4, 6, 6, dtype=torch.float64), row.dialled(conv)
    layer.offset = None
    eps, hyper, gain = layer.dial_constants()
    options = dict(zip([layer.hyper_name], hyper, strict=False))
    if row.op == "kerv_poly":
        options["degree"] = layer.degree
    function = getattr(CF, f"{row.op}_dial")
    for images in (x, x[0]):
        got = function(images, layer.weight, layer.bias, 1, padding, 1, 2, eps=eps, gain=gain, **options)
        assert torch.equal(got, layer(images))


@pytest.mark.parametrize("name", [name for name in CF.__all__ if name.startswith("kerv_")])
def test_functional_form_refuses_what_a_convolution_refuses(name: str) -> None:
    function, options = getattr(CF, name), {"gamma": 0.1} if name == "kerv_gauss" else {}
    if name.endswith("_dial"):
        options = {"eps": 0.1, **({"kappa": 1} if name == "kerv_gauss_dial" else {})}
    x, w = torch.randn(1, 4, 6, 6), torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match="padding='same' needs stride 1"):
        function(x, w, padding="same", stride=2, **options)
    with pytest.raises(ValueError, match="padding must be 'same', 'valid' or numbers, not 'full'"):
        function(x, w, padding="full", **options)


@pytest.mark.parametrize("degree", [0, -1])
def test_functional_polynomial_refuses_a_degree_below_1(degree: int) -> None:
    for function in (CF.kerv_poly, functools.partial(CF.kerv_poly_dial, eps=0.1)):
        with pytest.raises(ValueError, match=f"degree must be at least 1, not {degree}"):
            function(torch.randn(1, 4, 6, 6), torch.randn(2, 4, 3, 3), degree=degree)


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan])
def test_functional_dialled_forms_refuse_a_hyperparameter_of_0_and_below(value: float) -> None:
    x, w = torch.randn(1, 4, 6, 6), torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match="balance must be above 0"):
        CF.kerv_poly_dial(x, w, eps=0.1, balance=value)
    with pytest.raises(ValueError, match="kappa must be above 0"):
        CF.kerv_gauss_dial(x, w, eps=0.1, kappa=value)


@pytest.mark.parametrize("gamma", [0.0, -0.5, math.nan])
def test_functional_gaussian_refuses_a_gamma_of_0_and_below(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be above 0"):
        CF.kerv_gauss(torch.randn(1, 4, 6, 6), torch.randn(2, 4, 3, 3), gamma=gamma)


def test_functional_hyperparameter_may_be_a_whole_number() -> None:
    x, w = torch.randn(1, 4, 6, 6), torch.randn(2, 4, 3, 3)
    assert torch.equal(CF.kerv_poly(x, w, balance=1), CF.kerv_poly(x, w, balance=1.0))
    assert torch.equal(CF.kerv_gauss(x, w, gamma=1), CF.kerv_gauss(x, w, gamma=1.0))


# The neutral start: test_dial.py has today's. Models saved by convsurgery 0.1 have filters that are scaled.


def is_power_of_two(values: Tensor) -> bool:
    return bool((torch.frexp(values.abs().double()).mantissa == 0.5).all())


@neutral_rows
def test_scaled_form_has_an_error_of_its_order(row: Row) -> None:
    conv, x = make("even-same")
    wanted, limit = naive.convolve(conv, x), row.neutral
    errors = [naive.error(row.scaled(conv, eps).module(x), wanted) for eps in limit.eps]
    if limit.order == 0:
        assert max(errors) <= row.float64
        return
    for large, tiny, before, after in zip(limit.eps, limit.eps[1:], errors, errors[1:], strict=False):
        expected = (large / tiny) ** limit.order
        assert 0.4 * expected <= before / after <= 2.5 * expected


@neutral_rows
@pytest.mark.parametrize("eps", [None, 1e-3, 0.3])
def test_scaled_form_is_exactly_scaled(row: Row, eps: float | None) -> None:
    """By a power of two: no bit of the pretrained weight is lost."""
    conv, x = make("k3", torch.float32)
    layer = row.scaled(conv, eps).module
    assert is_power_of_two(layer.scale)
    assert layer.weight is conv.weight
    assert layer.centered
    assert naive.error(layer(x), row.naive(layer, x)) < 1e-5


@neutral_rows
def test_scaled_form_tells_of_the_gain_that_it_leaves(row: Row) -> None:
    """``absorb`` leaves a residual: module = residual · convolution, channel by channel."""
    conv, x = make("valid-no-bias")
    conv.weight.data *= torch.linspace(0.2, 2, 6).view(-1, 1, 1, 1)
    built = row.scaled(conv, row.neutral.eps[-1] / 16, absorb=True)
    residual = torch.ones(6).double() if built.residual is None else built.residual
    assert residual.dtype == torch.float64
    assert residual.shape == (6,)
    assert built.module.gain.dim() == 0
    assert is_power_of_two(built.module.gain)
    wanted = naive.convolve(conv, x) * residual.view(-1, 1, 1)
    assert naive.error(built.module(x), wanted) < 1e-3
    alone = row.scaled(conv, row.neutral.eps[-1] / 16)
    assert alone.residual is None
    assert naive.error(alone.module(x), naive.convolve(conv, x)) < 1e-3


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("neutral", "neutral", None),
        (" neutral(1e-3) ", "neutral", 1e-3),
        ("neutral( eps = 0.5 )", "neutral", 0.5),
        ("neutral(0)", "neutral", 0.0),
        ("copy", "copy", None),
        ("random", "random", None),
        ("random(7)", "random", 7.0),
        ("random(seed=7)", "random", 7.0),
    ],
)
def test_start_is_read(text: str, name: str, value: float | None) -> None:
    start = Start.parse(text)
    assert (start.name, start.value) == (name, value)
    assert Start.parse(str(start)) == start
    assert Start.parse(start) is start


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("neutrl", "unknown start 'neutrl'\ndid you mean 'neutral'?"),
        ("", "unknown start ''"),
        ("blend(", "unknown start 'blend('"),
        ("copy(1)", "start copy takes no argument: 'copy(1)'"),
        ("neutral(seed=1)", "start neutral takes only eps: 'neutral(seed=1)'"),
        ("neutral(small)", "start neutral: 'small' is not a number"),
        ("neutral(-0.1)", "eps must be from 0 to 1, not -0.1"),
        ("neutral(1.5)", "eps must be from 0 to 1, not 1.5"),
        ("neutral(nan)", "eps must be from 0 to 1, not nan"),
        ("random(-1)", "seed must be a whole number from 0 to 2^53, not -1"),
        ("random(0.5)", "seed must be a whole number from 0 to 2^53, not 0.5"),
    ],
)
def test_start_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Start.parse(text)


@pytest.mark.parametrize("seed", ["inf", "nan"])
def test_random_start_with_a_seed_that_is_no_number_is_refused(seed: str) -> None:
    with pytest.raises(ArgumentError, match="seed must be a whole number"):
        Start.parse(f"random({seed})")


@all_rows
def test_default_start(row: Row) -> None:
    start = row.config.start_for(None)
    assert start == Start("neutral" if row.neutral else "copy")
    assert row.config.starts[start.name]


@pytest.mark.parametrize(
    ("rule", "start", "message"),
    [
        ("kerv-l1", "neutral", "kerv-l1 has no start 'neutral'\nknown: blend, copy, fit, random"),
        ("conv", "neutral", "conv has no start 'neutral'"),
        ("kerv-poly(balance=0)", "neutral", "without a balance the polynomial has no linear term"),
        ("kerv-gauss(gamma=0.5)", "neutral", "the neutral start chooses gamma itself; leave gamma out"),
    ],
)
def test_start_that_the_operator_has_not(rule: str, start: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        bind(parse_target(rule)).start_for(Start.parse(start))


# Configs, rules, the registry.


@all_rows
def test_config_and_rule_are_the_same(row: Row) -> None:
    config = row.config
    assert bind(parse_target(str(config))) == config
    assert bind(config.to_target()) == config
    assert type(config).name in list_operators()
    for text in (config.summary, config.formula, config.source):
        assert text


def test_rule_with_a_whole_number_for_a_real_one() -> None:
    assert bind(parse_target("kerv-poly(balance=2)")) == KervPoly(balance=2.0)
    assert type(bind(parse_target("kerv-poly(balance=2)")).balance) is float
    assert bind(parse_target("kerv-gauss(gamma=none)")) == KervGauss()


@pytest.mark.parametrize(
    ("text", "marked", "message"),
    [
        ("kerv-pol", "kerv-pol", "unknown operator 'kerv-pol'||did you mean 'kerv-poly'"),
        ("kerv-poly(degre=3)", "degre=3", "kerv-poly has no argument 'degre'||did you mean 'degree'?"),
        ("kerv-l1(gamma=3)", "gamma=3", "kerv-l1 has no argument 'gamma'||kerv-l1 takes no arguments"),
        ("kerv-poly(degree=0)", "degree=0", "degree wants an integer from 1 to 64, not 0"),
        ("kerv-poly(balance=1, degree=2.5)", "degree=2.5", "degree wants an integer from 1 to 64, not 2.5"),
        ("kerv-poly(degree=true)", "degree=true", "degree wants an integer from 1 to 64, not true"),
        ("kerv-poly(balance=-1)", "balance=-1", "balance wants a number >= 0, not -1"),
        ("kerv-poly(balance=inf)", "balance=inf", "balance wants a number >= 0, not inf"),
        ("kerv-poly(balance=0, learnable=true)", "balance=0", "a learnable balance must start above 0||try balance=1"),
        ("kerv-poly(learnable=layer)", "learnable=layer", "learnable wants true or false or channel, not layer"),
        ("kerv-poly(learnable=1)", "learnable=1", "learnable wants true or false or channel, not 1"),
        ("kerv-gauss(gamma=0)", "gamma=0", "gamma wants a number > 0, not 0"),
        ("kerv-gauss(gamma=wide)", "gamma=wide", "gamma wants a number > 0, not wide"),
    ],
)
def test_caret_stands_under_the_argument(text: str, marked: str, message: str) -> None:
    with pytest.raises(RuleError, match=re.escape(message.partition("||")[0])) as caught:
        bind(parse_target(text))
    head, line, caret, *hint = str(caught.value).split("\n")
    assert line == f"  {text}"
    assert caret.count("^") > 0
    assert caret.index("^") == line.index(marked)
    assert caret.rstrip()[-1] == "^"
    assert len(caret) <= len(line)
    assert message.partition("||")[2] in "\n".join(hint)
    assert head


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: KervPoly(degree=2.0), "degree wants an integer from 1 to 64, not 2.0"),
        (lambda: KervPoly(degree=True), "degree wants an integer from 1 to 64, not true"),
        (lambda: KervPoly(balance=math.nan), "balance wants a number >= 0, not nan"),
        (lambda: KervPoly(learnable="layer"), "learnable wants true or false or channel, not layer"),
        (lambda: KervGauss(gamma=-1), "gamma wants a number > 0, not -1"),
    ],
)
def test_config_in_python_is_checked_too(make_config: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        make_config()


@dataclass(frozen=True)
class Halved(OperatorConfig):
    """A user's own operator: half the convolution."""

    summary: ClassVar[str] = "half the convolution"
    formula: ClassVar[str] = "wᵀx · f"
    source: ClassVar[str] = "this test"
    starts: ClassVar[dict[str, str]] = {"copy": "none"}

    factor: float = option(0.5, "factor f", kind=float, above=0)

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        new = copy.deepcopy(conv)
        new.weight.data *= self.factor
        return Built(new)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    monkeypatch.setattr(Halved, "name", "")


@pytest.mark.usefixtures("own_registry")
def test_operator_of_a_user_in_a_rule() -> None:
    register_operator("halved")(Halved)
    assert "halved" in list_operators()
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    x = torch.randn(2, 3, 8, 8)
    new = convsurgery.convert(model, "all-conv->halved(factor=0.25)", example_inputs=x)
    torch.testing.assert_close(new(x), model(x) / 16, rtol=1e-6, atol=0)
    with pytest.raises(RuleError, match="halved has no argument 'factr'"):
        convsurgery.convert(model, "all-conv->halved(factr=1)", example_inputs=x)


def test_registry_of_the_tests_is_clean() -> None:
    assert "halved" not in list_operators()
    assert "newcomer" not in list_operators()


@pytest.mark.usefixtures("own_registry")
def test_second_operator_of_a_name_is_refused() -> None:
    with pytest.raises(ConvSurgeryError, match="operator 'kerv-poly' is already registered by KervPoly"):
        register_operator("kerv-poly")(Halved)
    assert base.operator("kerv-poly") is KervPoly
    assert register_operator("kerv-poly")(KervPoly) is KervPoly  # a module that is read twice does no harm


@pytest.mark.parametrize("name", ["keep", "Kerv", "kerv_poly", "", "1st"])
def test_name_that_a_rule_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ConvSurgeryError, match=re.escape(f"{name!r} cannot name an operator")):
        register_operator(name)(Halved)


def test_layers_refuse_what_conv2d_refuses() -> None:
    for row in KERVOLUTIONS:
        layer = type(row.layer(make()[0]))
        assert issubclass(layer, Kervolution2d)
        with pytest.raises(ValueError, match="out_channels must be divisible by groups"):
            layer(4, 6, 3, groups=4)
        with pytest.raises(ValueError, match="padding='same' is not supported for strided convolutions"):
            layer(4, 6, 3, padding="same", stride=2)
