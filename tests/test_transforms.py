"""torch.func and forward-mode differentiation through every operator, against autograd and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import convsurgery as cs

KERNELS = ["linear", "poly", "gauss", "sigmoid", "l2", "l1"]
RULES = [f"kerv-{kernel} by {start}" for kernel in KERNELS for start in ("neutral", "copy") if kernel != "l1"]
RULES += ["kerv-l1 by copy", "pnn", "lbc", "linear-mix(extend=true)"]


def layer_of(rule: str, **options: Any) -> tuple[nn.Module, Tensor]:
    conv = nn.Conv2d(4, 6, 3, padding=1, **options).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    rule = rule if "kerv-linear" not in rule else rule.replace("by neutral", "by copy")
    layer = cs.convert(nn.Sequential(conv), f"all-conv->{rule}", example_inputs=x)[0]
    eps = layer._buffers.get("eps")
    if eps is not None:
        eps.fill_(0.5)
    return layer, x


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_single_samples(rule: str) -> None:
    layer, x = layer_of(rule)
    params, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

    def loss(params: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(layer, (params, buffers), (image[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(params, x)
    for index, image in enumerate(x):
        layer.zero_grad()
        layer(image[None]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(found[name][index], parameter.grad, rtol=1e-9, atol=1e-9)
    stacked = torch.stack([params["weight"], 2 * params["weight"]]).detach()
    each = vmap(lambda w: functional_call(layer, ({**params, "weight": w}, buffers), (x,)))(stacked)
    for weight, out in zip(stacked, each, strict=True):
        torch.testing.assert_close(functional_call(layer, ({**params, "weight": weight}, buffers), (x,)), out)


@pytest.mark.parametrize("rule", RULES)
def test_forward_mode(rule: str) -> None:
    layer, x = layer_of(rule)
    direction, step = torch.randn_like(x), 1e-6
    expected = (layer(x + step * direction) - layer(x - step * direction)).detach() / (2 * step)
    _, tangent = jvp(lambda x: layer(x), (x,), (direction,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
    scale = float(expected.abs().max())
    for found in (tangent, dual):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("rule", RULES)
def test_second_derivatives(rule: str) -> None:
    layer, x = layer_of(rule)
    image = x[:1, :, :4, :4]

    def score(image: Tensor) -> Tensor:
        return layer(image).square().sum()

    found = jacfwd(jacrev(score))(image).flatten()
    step, direction = 1e-5, torch.randn_like(image)
    ahead, behind = (grad(score)(image + sign * step * direction) for sign in (1, -1))
    along = found.view(image.numel(), image.numel()) @ direction.flatten()
    expected = ((ahead - behind) / (2 * step)).flatten()
    torch.testing.assert_close(along, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
