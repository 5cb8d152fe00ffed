"""Foreseeing trouble: operators whose output at a site is much larger than the convolution's, or saturates."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.adapt.running import eval_mode
from convsurgery.surgery import Entry, Plan
from convsurgery.surgery.apply import build_layer

__all__ = ["growth_notes"]

#: output scale in multiples of the convolution's from which on it is told
_FACTOR = 10.0
#: size of the random images where there are no data, and images looked at where there are
_SIDE, _IMAGES = 12, 8


def growth_notes(model: nn.Module, plan: Plan, images: Iterable[Tensor] | None = None) -> tuple[str, ...]:
    """What to say of replacements that make a site's output grow tenfold and more, which in training ends in NaN.

    Only starts that do not keep the convolution can. Scales are root mean squares: on the model's own activations when
    there are ``images`` (N, C, H, W), else on normal random inputs with the layer's own weights. Nothing is said of a
    model without weights.
    """
    entries = [e for e in plan.edits if e.block is None and e.exactness == "none"]
    modules = dict(model.named_modules())
    entries = [e for e in entries if not _weightless(modules.get(e.site.name))]
    if not entries:
        return ()
    inputs = _seen(model, [entry.site.name for entry in entries], images) if images is not None else {}
    grown: list[tuple[float, str, str]] = []
    saturated: list[str] = []
    for entry in entries:
        factor, note = _factor(modules[entry.site.name], entry, inputs.get(entry.site.name))
        if factor is not None and not factor < _FACTOR:
            grown.append((factor, entry.site.label, str(entry.config)))
        if note:
            saturated.append(f"{entry.config} at {entry.site.label} {note}")
    more = f" (and {len(saturated) - 1} more sites)" if len(saturated) > 1 else ""
    notes = tuple(text + more for text in saturated[:1])
    if not grown:
        return notes
    factor, label, operator = max(grown)
    others = f", and at {len(grown) - 1} more sites it grows" if len(grown) > 1 else ""
    source = "on these images" if images is not None else "on random inputs"
    return (
        *notes,
        f"growth: {operator} at {label} gives {factor:.3g} times the convolution's output {source}{others}; start by "
        "neutral, fit or blend, or calibrate before training",
    )


def _weightless(module: Any) -> bool:
    return not isinstance(module, nn.Conv2d) or module.weight.is_meta


@torch.no_grad()
def _factor(conv: nn.Module, entry: Entry, given: Tensor | None) -> tuple[float | None, str]:
    """Scale of the operator's output over the convolution's, None where it is not known, and what saturates."""
    assert isinstance(conv, nn.Conv2d)
    assert entry.config is not None
    assert entry.start is not None
    twin = copy.deepcopy(conv).eval()
    layer = build_layer(twin, entry.config, entry.start, entry.site).module.eval()
    if given is None:
        shape = entry.site.input_shape
        if shape is None:
            return None, ""
        reach = max(d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
        size = [min(side, max(_SIDE, 2 * reach)) for side in shape[-2:]]
        given = torch.randn(1, conv.in_channels, *size, generator=torch.Generator().manual_seed(0))
    given = given.to(conv.weight)
    before, after = (float(part(given).double().square().mean().sqrt()) for part in (copy.deepcopy(conv).eval(), layer))
    saturation = getattr(layer, "saturation", None)
    note = "" if saturation is None else saturation(given) or ""
    return (after / max(before, 1e-30) if before == before else None), note


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
            model(next(iter(images))[:_IMAGES].clone())
    finally:
        for handle in handles:
            handle.remove()
    return found
