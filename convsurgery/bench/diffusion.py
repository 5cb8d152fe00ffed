"""LinearMix and the diffusion steps against the dense 3x3 convolution, and the figure of the paper redone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery import api
from convsurgery.bench.measure import medians
from convsurgery.errors import ConvSurgeryError
from convsurgery.files import writing
from convsurgery.operators.diffusion import ReactionDiffusion2d, op
from convsurgery.operators.diffusion.op import spectrum
from convsurgery.operators.linear_mix import LinearMix2d

__all__ = ["PROMISED", "bench_diffusion", "bench_diffusion_runtime", "bench_switch", "draw_figure"]

BATCH, SIZE = 8, 64
#: what is measured → channels → upper bound, as a multiple of the dense convolution
PROMISED: dict[str, dict[int, float]] = {
    "linear-mix": {64: 1.0, 256: 0.4},
    "implicit, diffusion": {64: 1.0, 256: 0.25},
    "explicit step": {256: 0.55},
    "circulant, diffusion": {256: 0.4},
}


def _calls(channels: int, size: int, kernel: int, batch: int) -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(0)
    x, r = torch.randn(2, batch, channels, size, size)
    dense = torch.randn(channels, channels, kernel, kernel) * 0.01
    weight, h = torch.randn(channels, 1, kernel, kernel) * 0.1, torch.tensor(0.1)
    mix = LinearMix2d(channels, channels, kernel, padding=kernel // 2, bias=False)
    step = ReactionDiffusion2d(channels, kernel).eval()
    step_op = torch.ops.convsurgery.reaction_diffusion2d
    factors = {form: spectrum(weight, h, (size, size), form) for form in ("implicit", "circulant")}
    return {
        "conv": lambda: F.conv2d(x, dense, padding=kernel // 2),
        "linear-mix": lambda: mix(x),
        "explicit step": lambda: step(x),
        "implicit, diffusion": partial(step_op, x, r, weight, h, factors["implicit"], "implicit", "periodic", True),
        "circulant, diffusion": partial(step_op, x, r, weight, h, factors["circulant"], "circulant", "periodic", True),
    }


def _ratios(
    channels: int, size: int, kernel: int, batch: int, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Multiples of the convolution's time, and seconds."""
    with torch.no_grad():
        taken = medians(_calls(channels, size, kernel, batch), repeats, warmup=2)
    return {name: taken[name] / taken["conv"] for name in PROMISED}, taken


def bench_diffusion(repeats: int) -> dict[str, dict[str, float]]:
    """Multiples of the dense convolution by channels, and of their own time with a kernel of 3 for one of 11."""
    rounds = max(5, repeats // 5)
    found: dict[str, dict[str, float]] = {name: {} for name in PROMISED}
    seconds: dict[str, float] = {}
    for channels in (64, 128, 256):
        ratios, taken = _ratios(channels, SIZE, 3, BATCH, rounds)
        for name, ratio in ratios.items():
            found[name][str(channels)] = ratio
        seconds = taken
    with torch.no_grad():
        calls = _calls(256, SIZE, 11, BATCH)
        del calls["conv"]
        wide = medians(calls, rounds, warmup=2)
    for name in ("implicit, diffusion", "circulant, diffusion"):
        found[name]["kernel 11 to 3"] = wide[name] / seconds[name]
    return found


def bench_switch(repeats: int) -> dict[str, float]:
    """Time of the circulant operator as a dense convolution over that by Fourier transform, by channels."""
    found = {}
    for channels in (8, 16, 32):
        torch.manual_seed(0)
        x, weight, h = torch.randn(BATCH, channels, SIZE, SIZE), torch.randn(channels, 1, 3, 3), torch.tensor(0.1)
        dense, factors = op._circulant_kernel(weight), spectrum(weight, h, (SIZE, SIZE), "circulant")
        calls = {
            "dense": partial(op._circulant_dense, x, dense),
            "fourier": partial(op._circulant_squared, x, weight, factors),
        }
        with torch.no_grad():
            taken = medians(calls, max(20, repeats))
        found[str(channels)] = taken["dense"] / taken["fourier"]
    return found


def bench_diffusion_runtime(repeats: int, threads: int) -> dict[str, float]:
    """The implicit node in ONNX Runtime as a multiple of a dense 3x3 Conv with 256 channels, by image size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    found = {}
    for size in (28, 14):
        torch.manual_seed(0)
        images = torch.randn(BATCH, 256, size, size)
        calls = {}
        with tempfile.TemporaryDirectory() as folder:
            layers = {"conv": nn.Conv2d(256, 256, 3, padding=1, bias=False), "new": _OnlyDiffusion(256).eval()}
            for name, layer in layers.items():
                path = Path(folder) / f"{name}.onnx"
                api.export_onnx(layer, path, example_inputs=images, dynamic_batch=False)
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
                calls[name] = partial(session.run, None, {"input": images.numpy()})
        taken = medians(calls, max(10, repeats // 2))
        found[f"{size}²"] = taken["new"] / taken["conv"]
    return found


class _OnlyDiffusion(nn.Module):
    """An implicit step whose reaction is the image itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.step = ReactionDiffusion2d(channels, form="implicit")

    def forward(self, x: Tensor) -> Tensor:
        step = self.step
        assert step.step is not None
        out: Tensor = torch.ops.convsurgery.reaction_diffusion2d(
            x, x, step.weight, step.step, None, "implicit", "periodic", True
        )
        return out


def draw_figure(path: Path, repeats: int) -> None:
    """Figure 1 of the paper, on this machine: time of the dense convolution over ours, against size, kernel, channels.

    Raises:
        ConvSurgeryError: where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConvSurgeryError("the figure is drawn by matplotlib: pip install matplotlib") from error
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "convsurgery"
    rounds = max(3, repeats // 10)
    sweeps = (
        ("image size, pixels", [(128, size, 3) for size in (16, 32, 48, 64, 96)], 1),
        ("kernel size", [(128, 48, kernel) for kernel in (3, 5, 7, 9, 11)], 2),
        ("channels", [(channels, 64, 3) for channels in (16, 32, 64, 128, 192, 256)], 0),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, (label, shapes, place) in zip(axes, sweeps, strict=True):
        measured = [_ratios(*shape, BATCH, rounds)[0] for shape in shapes]
        for name, style in zip(PROMISED, ("o-", "s-", "^-", "d-"), strict=True):
            axis.plot([shape[place] for shape in shapes], [1 / ratios[name] for ratios in measured], style, label=name)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xlabel(label)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(True, which="both", alpha=0.25)
    axes[0].set_ylabel("times faster than the dense convolution")
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as staged:
        figure.savefig(staged, format="svg", metadata={"Date": None})
    plt.close(figure)
