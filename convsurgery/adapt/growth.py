"""Foreseeing trouble: operators whose output at a site is much larger than the convolution's, saturates, or strays."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.adapt.running import eval_mode
from convsurgery.surgery import Entry, Plan
from convsurgery.surgery.apply import build_layer

__all__ = ["IMAGES", "growth_notes"]

#: output scale in multiples of the convolution's from which on it is told
_FACTOR = 10.0
#: error relative to the convolution's output from which on a start that was to be near it is told of
_NEAR = 0.1
#: size of the random images where there are no data, and images looked at where there are
_SIDE, IMAGES = 12, 8


@dataclass(frozen=True)
class _Compared:
    """An operator's output beside the convolution's, on the same input.

    Attributes:
        factor: root mean square of the one over that of the other; None where it is not known.
        error: root mean square of their difference over that of the convolution's.
        saturation: what of the operator hardly answers any more, or "".
        source: which inputs they were.
    """

    factor: float | None
    error: float = 0.0
    saturation: str = ""
    source: str = ""


def growth_notes(model: nn.Module, plan: Plan, images: Iterable[Tensor] | None = None) -> tuple[str, ...]:
    """What to say of replacements that make a site's output grow tenfold and more, which in training ends in NaN.

    And of those that were to be near the convolution and at this scale are not. Only starts that do not keep the
    convolution exactly can do either. Scales are root mean squares: on the model's own activations when there are
    ``images`` (N, C, H, W); else on normal random inputs with the layer's own weights, as large as the BatchNorm behind
    has seen the convolution's output. Nothing is said of a model without weights.
    """
    entries = [e for e in plan.edits if e.block is None and e.exactness in ("none", "approximate")]
    modules = dict(model.named_modules())
    entries = [e for e in entries if not _weightless(modules.get(e.site.name))]
    if not entries:
        return ()
    inputs = _seen(model, [entry.site.name for entry in entries], images) if images is not None else {}
    grown: list[tuple[float, Entry, str]] = []
    strayed: list[tuple[float, Entry, str]] = []
    saturated: list[str] = []
    for entry in entries:
        found = _compared(modules, entry, inputs.get(entry.site.name))
        if found.factor is not None and not found.factor < _FACTOR:
            grown.append((found.factor, entry, found.source))
        elif entry.exactness == "approximate" and not found.error < _NEAR:
            strayed.append((found.error, entry, found.source))
        if found.saturation:
            saturated.append(f"{entry.config} at {entry.site.label} {found.saturation}")
    more = f" (and {len(saturated) - 1} more sites)" if len(saturated) > 1 else ""
    notes = [text + more for text in saturated[:1]]
    if strayed:
        error, entry, source = max(strayed, key=lambda each: each[0])
        others = f", and at {len(strayed) - 1} more sites" if len(strayed) > 1 else ""
        notes.append(
            f"scale: {entry.config} by {entry.start} at {entry.site.label} is off by {error:.0%} of the convolution's "
            f"output {source}{others}; a smaller eps is nearer, neutral without one is exact"
        )
    if grown:
        factor, entry, source = max(grown, key=lambda each: each[0])
        others = f", and at {len(grown) - 1} more sites it grows" if len(grown) > 1 else ""
        way = "neutral, fit or blend" if entry.exactness == "none" else "neutral without an eps"
        notes.append(
            f"growth: {entry.config} at {entry.site.label} gives {factor:.3g} times the convolution's output "
            f"{source}{others}; start by {way}, or calibrate before training"
        )
    return tuple(notes)


def _weightless(module: Any) -> bool:
    return not isinstance(module, nn.Conv2d) or module.weight.is_meta


@torch.no_grad()
def _compared(modules: Mapping[str, nn.Module], entry: Entry, given: Tensor | None) -> _Compared:
    conv = modules[entry.site.name]
    assert isinstance(conv, nn.Conv2d)
    assert entry.config is not None
    assert entry.start is not None
    twin, plain = copy.deepcopy(conv).eval(), copy.deepcopy(conv).eval()
    layer = build_layer(twin, entry.config, entry.start, entry.site).module.eval()
    source = "on these images"
    if given is None:
        if entry.site.input_shape is None:
            return _Compared(None)
        norm = modules.get(entry.site.batchnorm or "")
        given, source = _drawn(plain, entry.site.input_shape, norm, entry.site.batchnorm)
    given = given.to(conv.weight)
    wanted, got = (part(given).double() for part in (plain, layer))
    before, after, apart = (float(t.square().mean().sqrt()) for t in (wanted, got, got - wanted))
    saturation = getattr(layer, "saturation", None)
    note = "" if saturation is None else saturation(given) or ""
    if before != before:
        return _Compared(None, saturation=note)
    return _Compared(after / max(before, 1e-30), apart / max(before, 1e-30), note, source)


def _drawn(conv: nn.Conv2d, shape: Sequence[int], norm: nn.Module | None, name: str | None) -> tuple[Tensor, str]:
    """Random inputs of a convolution, and what is to be said of them."""
    reach = max(d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    size = [min(side, max(_SIDE, 2 * reach)) for side in shape[-2:]]
    drawn = torch.randn(1, conv.in_channels, *size, generator=torch.Generator().manual_seed(0)).to(conv.weight)
    mean, variance = (getattr(norm, key, None) for key in ("running_mean", "running_var"))
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor) or variance.is_meta:
        return drawn, "on random inputs"
    if not bool(mean.any()) and bool((variance == 1).all()):  # it has seen nothing yet
        return drawn, "on random inputs"
    seen, ours = float(variance.double().mean()), float(conv(drawn).double().var((0, 2, 3), unbiased=False).mean())
    ratio = math.sqrt(seen / ours) if ours > 0 and seen > 0 else 1.0
    if not math.isfinite(ratio):
        return drawn, "on random inputs"
    return drawn * ratio, f"on random inputs of the size that {name} has seen"


def _seen(model: nn.Module, names: list[str], images: Iterable[Tensor]) -> dict[str, Tensor]:
    """What the convolutions get, from one pass over the first images."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def look(_: nn.Module, args: Any) -> None:
            found.setdefault(name, args[0].detach().clone())

        return look

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        with eval_mode(model), torch.no_grad():
            model(next(iter(images))[:IMAGES].clone())
    finally:
        for handle in handles:
            handle.remove()
    return found
