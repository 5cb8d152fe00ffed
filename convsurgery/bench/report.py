"""Benchmarks as text or JSON."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from convsurgery.errors import ConvSurgeryError, nearest

__all__ = ["run_bench"]

PARTS = ("ops", "diffusion", "onnx", "convert", "starts", "all")


def run_bench(
    what: str = "all", repeats: int = 30, threads: int = 2, as_json: bool = False, figure: Path | None = None
) -> str:
    """Run benchmarks and return the report; ``figure`` is where the diffusion part, or that of starts, draws its SVG.

    The part of starts trains networks and takes some ten minutes, so that "all" leaves it out.

    Raises:
        ConvSurgeryError: for a benchmark that does not exist.
    """
    if what not in PARTS:
        raise ConvSurgeryError(f"no benchmark {what!r}; {nearest(what, PARTS)}")
    torch.set_num_threads(threads)
    results: dict[str, Any] = {"machine": f"{platform.machine()}, {threads} threads, torch {torch.__version__}"}
    lines = [results["machine"]]
    if what in ("ops", "all"):
        lines += _operators(results, repeats)
    if what == "starts":
        results["starts"] = _starts(figure)
        lines += ["", *results["starts"]]
    if what in ("diffusion", "all"):
        lines += _diffusion(results, repeats, threads, figure)
    if what in ("onnx", "all"):
        lines += _runtime(results, repeats, threads)
    if what in ("convert", "all"):
        lines += _convert(results, repeats)
    return json.dumps(results, indent=1) if as_json else "\n".join(lines)


def _operators(results: dict[str, Any], repeats: int) -> list[str]:
    from convsurgery.bench.operators import BATCH, CHANNELS, KERNEL, SIZE, bench_memory, bench_operators, bench_unfold

    times = bench_operators(repeats)
    memory = bench_memory()
    results["memory beside the output, in outputs"] = memory
    unfold = bench_unfold(repeats)
    results["ops"] = [dataclasses.asdict(time) for time in times]
    results["times faster than unfold"] = unfold
    lines = [
        f"\nmultiples of F.conv2d, float32, batch {BATCH}, {CHANNELS}→{CHANNELS}, {SIZE}², {KERNEL}x{KERNEL}",
        f"{'operator':<14}{'start':<9}{'inference':>10}{'promised':>10}{'fwd + bwd':>11}{'promised':>10}",
    ]
    for time in times:
        bounds = ["measured" if bound is None else f"≤ {bound:g}" for bound in time.promised]
        lines.append(
            f"{time.name:<14}{time.start:<9}{time.inference:>9.2f}×{bounds[0]:>10}{time.training:>10.2f}×{bounds[1]:>10}"
        )
    lines += [f"{name}: {factor:.0f}× faster than its unfold form" for name, factor in unfold.items()]
    lines += [f"{rule}: {extra:.2f} outputs of memory beside the output" for rule, extra in memory.items()]
    return lines


def _starts(figure: Path | None) -> list[str]:
    from convsurgery.bench.starts import bench_starts

    lines = []
    for line in bench_starts(figure):
        print(line, file=sys.stderr, flush=True)
        lines.append(line)
    return lines


def _diffusion(results: dict[str, Any], repeats: int, threads: int, figure: Path | None) -> list[str]:
    from convsurgery.bench import diffusion

    found = diffusion.bench_diffusion(repeats)
    nodes = diffusion.bench_diffusion_runtime(repeats, threads)
    results["diffusion"], results["diffusion in ONNX Runtime"] = found, nodes
    lines = [
        f"\nmultiples of the dense 3x3 convolution, batch {diffusion.BATCH}, {diffusion.SIZE}², inference",
        f"{'channels':<23}{'64':>8}{'128':>8}{'256':>8}  promised",
    ]
    for name, ratios in found.items():
        values = "".join(f"{ratios[channels]:>7.2f}×" for channels in ("64", "128", "256"))
        bounds = ", ".join(f"≤ {bound:g} at {c}" for c, bound in diffusion.PROMISED[name].items())
        lines.append(f"{name:<23}{values}  {bounds}")
    for name, ratios in found.items():
        if "kernel 11 to 3" in ratios:
            lines.append(f"{name}, kernel of 11 to one of 3, 256 channels: {ratios['kernel 11 to 3']:.2f}× (≤ 1.1)")
    switch = diffusion.bench_switch(repeats)
    results["circulant dense to Fourier"] = switch
    shown = ", ".join(f"{ratio:.2f}× at {channels}" for channels, ratio in switch.items())
    lines.append(f"circulant as a dense convolution to Fourier, by channels: {shown}")
    for size, ratio in nodes.items():
        lines.append(f"implicit node in ONNX Runtime to Conv, 256 channels, {size}: {ratio:.2f}× (≤ 0.4)")
    if figure is not None:
        diffusion.draw_figure(figure, repeats)
        lines.append(f"wrote {figure}")
    return lines


def _runtime(results: dict[str, Any], repeats: int, threads: int) -> list[str]:
    from convsurgery.bench.runtime import bench_runtime

    found = bench_runtime(repeats, threads)
    results["onnx"] = {rule: ratio for rule, (ratio, _) in found.items()}
    lines = ["\nmultiples of the Conv in ONNX Runtime, same shape"]
    for rule, (ratio, bound) in found.items():
        lines.append(f"{rule:<23}{ratio:>9.2f}×{'measured' if bound is None else f'≤ {bound:g}':>10}")
    return lines


def _convert(results: dict[str, Any], repeats: int) -> list[str]:
    from convsurgery.bench.convert import bench_convert

    taken = bench_convert(repeats)
    results["convert"] = taken
    lines = ["\nresnet50, all-conv->kerv-poly, shapes included"]
    lines += [f"{name:<32}{seconds * 1e3:>8.0f} ms" for name, seconds in taken.items()]
    for peer in ("timm create_feature_extractor", "timm get_graph_node_names"):
        lines.append(f"convert / {peer}: {taken['convert'] / taken[peer]:.2f}×")
    return lines
