"""The operators against ``F.conv2d``, and the kervolutions against their unfold form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.bench.measure import medians, peak_bytes
from convsurgery.geometry import ConvGeometry, Site
from convsurgery.operators import Start, bind
from convsurgery.operators.kervolution import kerv_gauss, kerv_poly
from convsurgery.rules import parse_target

__all__ = ["OperatorTime", "bench_memory", "bench_operators", "bench_unfold", "layer_of"]

BATCH, CHANNELS, SIZE, KERNEL = 4, 64, 56, 3
#: upper bounds this project promises, as multiples of ``F.conv2d``: inference, forward + backward
PROMISED: dict[str, tuple[float | None, float | None]] = {
    "kerv-poly": (1.15, 1.3),
    "kerv-sigmoid": (1.4, 1.5),
    "kerv-l2": (1.6, 2.0),
    "kerv-gauss": (1.6, 2.0),
    "kerv-l1": (35.0, None),
    "pnn": (0.6, 0.8),
    "pnn(fanout=4)": (None, None),
    "lbc": (None, None),
}


@dataclass(frozen=True)
class OperatorTime:
    """Times of one layer as multiples of ``F.conv2d``'s in the same run."""

    name: str
    start: str
    inference: float
    training: float
    promised: tuple[float | None, float | None]


def layer_of(rule: str, start: str = "random") -> nn.Module:
    """The operator in place of the convolution that everything here is compared with."""
    torch.manual_seed(0)
    conv = nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2, bias=False)
    shape = (BATCH, CHANNELS, SIZE, SIZE)
    site = Site(("conv",), 0, ConvGeometry.of(conv), shape, shape, positions=SIZE * SIZE)
    config = bind(parse_target(rule))
    return config.build(conv, config.start_for(Start(start)), absorb=False, site=site).module


def _training(
    call: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], grad: Tensor
) -> Callable[[], None]:
    def step() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        call(x).backward(grad)

    return step


def bench_operators(repeats: int) -> list[OperatorTime]:
    """Every kernel in its paper's form (copy) and its neutral form, the others as they are drawn; float32."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    grad = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    weight = (torch.randn(CHANNELS, CHANNELS, KERNEL, KERNEL) * 0.05).requires_grad_()
    results = []
    for name, promised in PROMISED.items():
        starts = bind(parse_target(name)).starts
        for start in [start for start in ("copy", "neutral") if start in starts] if "copy" in starts else ["random"]:
            layer = layer_of(name, start)
            rounds = max(3, repeats // 10) if name == "kerv-l1" else repeats

            def conv(images: Tensor) -> Tensor:
                return F.conv2d(images, weight, padding=KERNEL // 2)

            with torch.no_grad():
                inference = medians({"conv": lambda: conv(x), "new": lambda: layer(x)}, rounds)  # noqa: B023
            leaf = x.clone().requires_grad_()
            training = medians(
                {
                    "conv": _training(conv, leaf, [weight], grad),
                    "new": _training(layer, leaf, list(layer.parameters()), grad),
                },
                rounds,
            )
            results.append(
                OperatorTime(
                    name, start, inference["new"] / inference["conv"], training["new"] / training["conv"], promised
                )
            )
    return results


def bench_unfold(repeats: int) -> dict[str, float]:
    """How many times faster poly and gauss are than their textbook form with a patch matrix (``F.unfold``)."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    w = torch.randn(CHANNELS, CHANNELS, KERNEL, KERNEL) * 0.05

    def unfolded(kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        patches = F.unfold(x, KERNEL, padding=KERNEL // 2).unsqueeze(1)
        return kernel(patches, w.flatten(1)[None, :, :, None]).view(BATCH, CHANNELS, SIZE, SIZE)

    with torch.no_grad():
        taken = medians(
            {
                "poly": lambda: kerv_poly(x, w, padding=1),
                "gauss": lambda: kerv_gauss(x, w, padding=1, gamma=0.01),
                "poly unfold": lambda: unfolded(lambda p, f: ((p * f).sum(2) + 1) ** 3),
                "gauss unfold": lambda: unfolded(lambda p, f: torch.exp(-0.01 * (p - f).square().sum(2))),
            },
            max(3, repeats // 10),
            warmup=1,
        )
    return {name: taken[f"{name} unfold"] / taken[name] for name in ("poly", "gauss")}


def bench_memory() -> dict[str, float]:
    """Most memory held at one time beside the output, in outputs, by a perturbation layer in inference."""
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    found = {}
    for rule in ("pnn", "pnn(fanout=4)", "pnn(fanout=16)"):
        layer = layer_of(rule)
        with torch.no_grad():
            layer(x)
            found[rule] = peak_bytes(lambda: layer(x)) / (x.numel() * x.element_size()) - 1  # noqa: B023
    return found
