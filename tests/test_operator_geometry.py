"""Every legal Conv2d is a legal kervolution of the same shape, and the linear one is bit-equal to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_table import KERVOLUTIONS
from torch import nn

from convsurgery.geometry import ConvGeometry
from convsurgery.operators import Start, bind
from convsurgery.rules import parse_target

RELIABLE = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pairs(least: int, most: int) -> st.SearchStrategy[int | tuple[int, int]]:
    number = st.integers(least, most)
    return number | st.tuples(number, number)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Options of a Conv2d, and the shape of an input it accepts, batched or not."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    options: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": draw(pairs(1, 4)),
        "dilation": draw(pairs(1, 3)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
        "padding": draw(st.sampled_from(["same", "valid"]) | pairs(0, 4)),
    }
    if options["padding"] != "same":
        options["stride"] = draw(pairs(1, 3))
    geometry = ConvGeometry.of(nn.Conv2d(**options, device="meta"))
    left, right, top, bottom = geometry.padding
    # No smaller than the window, nor than what reflecting and wrapping around can fill.
    needs = [
        max(1, d * (k - 1) + 1 - before - after, before + 1, after + 1)
        for k, d, before, after in zip(
            geometry.kernel_size, geometry.dilation, (top, left), (bottom, right), strict=True
        )
    ]
    size = [draw(st.integers(need, need + 6)) for need in needs]
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return options, (*batch, options["in_channels"], *size)


def build(rule: str, conv: nn.Conv2d) -> nn.Module:
    return bind(parse_target(rule)).build(conv, Start("copy"), absorb=False).module


@settings(RELIABLE, max_examples=150)
@given(convolutions())
def test_linear_kervolution_is_conv2d_bit_for_bit(drawn: tuple[dict[str, Any], tuple[int, ...]]) -> None:
    options, shape = drawn
    conv, x = nn.Conv2d(**options), torch.randn(shape)
    wanted = conv(x)
    assert torch.equal(build("kerv-linear", conv)(x), wanted)
    assert torch.equal(build("conv", conv)(x), wanted)


@settings(RELIABLE, max_examples=150)
@given(convolutions())
def test_output_size_is_the_convolutions(drawn: tuple[dict[str, Any], tuple[int, ...]]) -> None:
    options, shape = drawn
    conv = nn.Conv2d(**options, device="meta")
    geometry = ConvGeometry.of(conv)
    assert geometry.output_size(*shape[-2:]) == tuple(conv(torch.empty(shape, device="meta")).shape[-2:])
    assert geometry.patch * geometry.out_channels == conv.weight.numel()


@settings(RELIABLE, max_examples=60)
@given(convolutions())
def test_every_operator_has_the_convolutions_shape(drawn: tuple[dict[str, Any], tuple[int, ...]]) -> None:
    options, shape = drawn
    conv, x = nn.Conv2d(**options), torch.randn(shape)
    wanted = conv(x).shape
    for row in KERVOLUTIONS:
        layer = build(row.rule, conv)
        y = layer(x)
        assert y.shape == wanted
        assert torch.isfinite(y).all()
        assert ConvGeometry.of(layer) == ConvGeometry.of(conv)


@settings(RELIABLE, max_examples=40)
@given(convolutions())
def test_every_operator_computes_its_formula(drawn: tuple[dict[str, Any], tuple[int, ...]]) -> None:
    options, shape = drawn
    conv, x = nn.Conv2d(**options).double(), torch.randn(shape).double()
    for row in KERVOLUTIONS:
        layer = row.full(conv, centered=True)
        got, wanted = layer(x), row.naive(layer, x)
        assert got.shape == wanted.shape
        # The largest value may be near 0 here, where terms cancel: the error is measured by 1 at least.
        assert float((got - wanted).detach().abs().max()) <= row.float64 * max(10.0, float(wanted.abs().max()) * 10)


@settings(RELIABLE, max_examples=25)
@given(convolutions())
def test_gradient_of_l1_is_its_slope(drawn: tuple[dict[str, Any], tuple[int, ...]]) -> None:
    """Its backward pass scatters by hand, with strides, dilations and padding."""
    options, shape = drawn
    conv, x = nn.Conv2d(**options).double(), torch.randn(shape).double()
    layer = build("kerv-l1", conv)
    seen = x.clone().requires_grad_()
    y = layer(seen)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    step, along = 1e-6, torch.randn_like(x)
    with torch.no_grad():
        slope = ((layer(x + step * along) - layer(x - step * along)) * direction).sum() / (2 * step)
    assert seen.grad.shape == x.shape
    torch.testing.assert_close((seen.grad * along).sum(), slope, rtol=1e-4, atol=1e-4)
