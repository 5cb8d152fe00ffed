"""Planning every classification architecture of timm and torchvision; slow, run with ``pytest -m slow``.

Models are built without memory for weights, so the whole zoo fits any machine. ``--junitxml=FILE`` keeps how each was
seen; docs/coverage.md holds the result.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import convsurgery as cs
from convsurgery import zoo
from convsurgery.errors import NoMatchError


def _names() -> list[str]:
    import torchvision
    from torchvision.models import list_models

    torch_names = [f"torchvision/{name}" for name in list_models(module=torchvision.models)]
    return [name for name in zoo.list_models() if not name.startswith("torchvision/")] + torch_names


@pytest.mark.slow
@pytest.mark.parametrize("name", _names())
def test_every_classifier_is_planned(name: str, record_property: Callable[[str, object], None]) -> None:
    model = zoo.create_model(name, device="meta")
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    record_property("convolutions", len(convs))
    if not convs:
        with pytest.raises(NoMatchError, match="the model has no Conv2d"):
            cs.plan(model, "all-conv->conv")
        return
    plan = cs.plan(model, "all-conv->conv")
    record_property("seen", plan.seen.partition(" (")[0])
    record_property("replaced", len(plan.edits))
    record_property("skipped", len(plan.skips))
    record_property("uncalled", sum(entry.site.index < 0 for entry in plan.entries))
    assert len(plan.entries) == len(convs)
    called = [entry for entry in plan.entries if entry.site.index >= 0]
    assert called
    assert [entry.site.index for entry in called] == list(range(len(called)))
    assert all(entry.reason or entry.config for entry in plan.entries)
    for entry in called:
        shape = entry.site.output_shape
        assert shape is not None
        if entry.site.kind == "Conv2d":
            height, width = entry.site.input_shape[-2:]
            assert shape[-2:] == entry.site.geometry.output_size(height, width)
