"""Operators in ONNX Runtime against the Conv they replace."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from convsurgery import api
from convsurgery.bench.measure import medians
from convsurgery.bench.operators import BATCH, CHANNELS, KERNEL, SIZE, layer_of

__all__ = ["bench_runtime"]

#: rule → upper bound this project promises, as a multiple of the Conv
PROMISED: dict[str, float | None] = {"pnn": 0.6, "pnn(fanout=4)": None, "lbc": None}


def bench_runtime(repeats: int, threads: int) -> dict[str, tuple[float, float | None]]:
    """Times of single nodes as multiples of the Conv's in the same run, with what is promised."""
    import onnxruntime

    torch.manual_seed(0)
    images = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    layers: dict[str, nn.Module] = {"conv": nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2, bias=False)}
    layers |= {rule: layer_of(rule) for rule in PROMISED}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The idle threads of one session would spin in the way of the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (rule, layer) in enumerate(layers.items()):
            path = Path(folder) / f"{number}.onnx"
            api.export_onnx(layer, path, example_inputs=images, dynamic_batch=False)
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            calls[rule] = partial(session.run, None, {"input": images.numpy()})
    taken = medians(calls, repeats)
    return {rule: (taken[rule] / taken["conv"], bound) for rule, bound in PROMISED.items()}
