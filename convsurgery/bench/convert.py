"""``convert`` against timm's own FX tracing of the same model."""

from __future__ import annotations

import warnings

import torch

from convsurgery import api
from convsurgery.bench.measure import medians

__all__ = ["bench_convert"]


def bench_convert(repeats: int, name: str = "resnet50") -> dict[str, float]:
    """Seconds of planning and converting, and of timm's two entries to FX: its graph extractor and its node listing."""
    import timm
    from timm.models import create_feature_extractor, get_graph_node_names

    model = timm.create_model(name).eval()
    x = torch.empty(1, 3, 224, 224)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = get_graph_node_names(model)[1][-1]
        return medians(
            {
                "convert": lambda: api.convert(model, "all-conv->kerv-poly", example_inputs=x),
                "plan": lambda: api.plan(model, "all-conv->kerv-poly", example_inputs=x),
                "timm create_feature_extractor": lambda: create_feature_extractor(model, [last]),
                "timm get_graph_node_names": lambda: get_graph_node_names(model),
            },
            max(5, repeats // 3),
        )
