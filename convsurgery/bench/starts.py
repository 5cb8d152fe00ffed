"""What is kept without training: starts, calibration, choosing; on networks trained on scikit-learn's digits."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

from convsurgery import api
from convsurgery.adapt.data import DataSplit, load_data
from convsurgery.operators import Start, bind
from convsurgery.operators.moments import Moments
from convsurgery.rules import parse_target

__all__ = ["MODELS", "SECTIONS", "bench_starts"]

#: network, epochs of training, learning rate
MODELS = {
    "resnet18": (5, 2e-3),
    "mobilenetv3_small_100": (12, 2e-3),
    "convnext_atto": (12, 2e-3),
}
SIZE, IMAGES = 32, 128
KERNELS = ("kerv-poly", "kerv-sigmoid", "kerv-gauss", "kerv-l2")
BLEND_EPOCHS = 5
BUDGET = "params<=-80%, agreement>=0.98"


@functools.cache
def trained(name: str) -> tuple[nn.Module, DataSplit]:
    """A network and the data it was trained on."""
    epochs, lr = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    data = load_data("digits", model=model, batch_size=64, img_size=SIZE, augment=False)
    api.finetune(model, data, epochs=epochs, lr=lr, kd_alpha=0.0, progress=False)
    return model.eval(), data


def images(data: DataSplit, count: int = IMAGES) -> Tensor:
    """The first training images; the same ones each time."""
    from convsurgery.adapt.images import Images

    return torch.cat(list(Images(data.train, count, nn.Identity())))


@torch.no_grad()
def kept(new: nn.Module, model: nn.Module, data: DataSplit) -> tuple[int, int, float]:
    """Test answers kept, test images, and the relative error of the logits."""
    same = count = 0
    error = size = 0.0
    home = next(model.parameters()).dtype
    for batch, _ in data.val or ():
        a, b = (part(batch.to(home)).double() for part in (model, new))
        same, count = same + int((a.argmax(1) == b.argmax(1)).sum()), count + len(a)
        error, size = error + float((a - b).square().sum()), size + float(a.square().sum())
    return same, count, (error / size) ** 0.5


def neutral() -> Iterator[str]:
    """All convolutions replaced, no training."""
    yield f"{'all convolutions by neutral':<36}{'no data':>16}{'ε by data':>15}{'target 1e-5':>13}"
    for name in MODELS:
        model, data = trained(name)
        for kernel in KERNELS:
            rule = f"all-conv->{kernel}"
            made = [api.convert(model, rule), *(api.convert(model, rule) for _ in range(2))]
            for new, target in zip(made[1:], (1e-3, 1e-5), strict=True):
                api.calibrate(new, images(data), teacher=model, target=target, progress=False)
            cells = []
            for new in made:
                same, count, error = kept(new, model, data)
                cells.append(f"{same}/{count} {error:.0e}")
            yield f"{name:<22}{kernel:<14}{cells[0]:>15} {cells[1]:>14} {cells[2]:>14}"
        half = copy.deepcopy(model).bfloat16()
        for kernel in KERNELS:
            same, count, _ = kept(api.convert(half, f"first-conv->{kernel}"), half, data)
            yield f"{name:<22}{kernel:<14} first convolution, bfloat16: {100 * same / count:.1f} % kept"


def least_squares() -> Iterator[str]:
    """The bare limit against least squares at the same ε, on the activations of the trained ResNet-18."""
    model, data = trained("resnet18")
    taken: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            taken[name] = args[0].clone(), out.clone()

        return look

    convolutions = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Conv2d)]
    handles = [part.register_forward_hook(keep(name)) for name, part in convolutions]
    with torch.no_grad():
        model(images(data, 64))
    for handle in handles:
        handle.remove()
    yield "error of a layer by least squares, over that of the bare limit at the same ε, median of 20 layers"
    for kernel in KERNELS:
        cells = []
        for power in (-6, -10, -14):
            ratios = []
            for name, (x, y) in taken.items():
                conv = model.get_submodule(name)
                assert isinstance(conv, nn.Conv2d)
                config = bind(parse_target(kernel))
                layer = config.build(copy.deepcopy(conv), Start("neutral", 2.0**power), absorb=False).module
                moments = Moments()
                with torch.no_grad():
                    moments.add(layer(x), y)
                ratios.append(moments.error(*moments.affine()) / max(moments.error(), 1e-30))
            cells.append(f"ε=2^{power}: {median(ratios):.2f}")
        yield f"{kernel:<14}{'   '.join(cells)}"


def fits() -> Iterator[str]:
    """Operators without a neutral setting, from data."""
    model, data = trained("resnet18")
    rule = "conv[k=3, s=1, cin=cout]->linear-mix"
    for count in (64, 512):
        new = api.convert(model, rule, calibration=images(data, count))
        same, total, _ = kept(new, model, data)
        yield f"linear-mix by fit on {count} images: {100 * same / total:.1f} % kept"
    same, total, _ = kept(api.convert(model, f"{rule} by project"), model, data)
    yield f"linear-mix by project: {100 * same / total:.1f} % kept"
    before = api.evaluate(model, data.val or ()).top1
    for rule in ("conv[k=3, s=1, cin=cout]->pnn(level=0.5)", "conv[in=BasicBlock, k=3]->pnn"):
        for start in ("fit", "random(0)"):
            new = api.apply(model, api.plan(model, f"{rule} by {start}"))
            if start == "fit":
                done = api.calibrate(new, images(data, 1024), teacher=model, batchnorm=True, progress=False)
                yield f"{rule} by fit: relative error of a layer {min(done.values()):.2f} to {max(done.values()):.2f}"
            same, total, _ = kept(new, model, data)
            result = api.finetune(new, data, teacher=model, epochs=1, lr=1e-4, warmup_epochs=0.2, progress=False)
            assert result.last.val_top1 is not None
            yield (
                f"{rule} by {start}: {100 * same / total:.1f} % kept, top-1 {result.last.val_top1:.2f} after one "
                f"epoch, {before - result.last.val_top1:.2f} points lost"
            )


def blend() -> Iterator[str]:
    """All convolutions of the ResNet to l1, by a blend and five epochs."""
    model, data = trained("resnet18")
    before = api.evaluate(model, data.val or ()).top1
    new = api.convert(model, "all-conv->kerv-l1 by blend", calibration=images(data, 256))
    begun = time.perf_counter()
    arrival = min(1.0, BLEND_EPOCHS / 2)
    result = api.finetune(new, data, teacher=model, epochs=BLEND_EPOCHS, lr=3e-3, blend_epochs=arrival, progress=False)
    rows = ", ".join(f"{row.val_top1:.2f}" for row in result.history)
    yield f"kerv-l1 by blend, top-1 by epochs: {rows} (original {before:.2f}), {time.perf_counter() - begun:.0f} s"
    yield f"convolutions left: {sum(isinstance(part, nn.Conv2d) for part in new.modules())}"


def scan() -> Iterator[str]:
    """What a scan costs."""
    model, _ = trained("resnet18")
    data = load_data("digits", model=model, batch_size=64, img_size=2 * SIZE, augment=False)
    batches = images(data, 256).split(64)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    sites = sum(isinstance(part, nn.Conv2d) for part in model.modules())
    one = _seconds(forward)
    for operators in ("conv", "linear-mix(extend=true)"):
        taken = _seconds(lambda operators=operators: api.scan(model, operators, list(batches), latency=False))  # type: ignore[misc]
        yield f"scan of {sites} sites, {operators}: {taken / one:.1f} forward passes"


def _seconds(call: Callable[[], object], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return median(times)


_MEMORY = """
import json, resource, sys, timm, torch, convsurgery as cs
model = timm.create_model("resnet18").eval()
torch.manual_seed(0)
batches = [torch.randn(32, 3, 224, 224) for _ in range(2)]
with torch.no_grad():
    model(batches[0])
made = cs.apply(model, cs.plan(model, sys.argv[1]))
with torch.no_grad():
    made(batches[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cs.calibrate(made, batches, teacher=model, progress=False)
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
"""


def memory() -> Iterator[str]:
    """Peak memory of calibrating, each in a process of its own."""
    for rule in ("all-conv->kerv-poly by neutral", "conv[k=3, s=1]->linear-mix by fit", "conv[k=3]->pnn by fit"):
        run = subprocess.run([sys.executable, "-c", _MEMORY, rule], capture_output=True, text=True, check=True)
        extra = float(json.loads(run.stdout.splitlines()[-1]))
        yield f"calibrate, ResNet-18 at 224², batch 32, {rule}: {extra:.0f} MB above inference"


def auto(figure: Path | None = None) -> Iterator[str]:
    """Choosing under a budget, and the curve of saving against agreement."""
    model, data = trained("resnet18")
    result = api.auto(model, f"conv[k=3]->auto(linear-mix | pnn, {BUDGET})", images(data, 1024))
    yield from str(result).splitlines()
    same, total, _ = kept(result.model, model, data)
    yield f"on the test images: {100 * same / total:.1f} % kept"
    choices = api.trade_off(result.scan, points=10)
    points = api.measure_choices(model, choices, images(data, 1024))
    for point in points:
        yield (
            f"parameters −{100 * point.saving:.0f} %: predicted {point.predicted:.3f}, "
            f"measured {point.measured:.3f} ({point.label})"
        )
    if figure is not None:
        api.draw_trade_off(points, figure)
        yield f"wrote {figure}"


SECTIONS: dict[str, Callable[..., Iterator[str]]] = {
    "neutral": neutral,
    "least squares": least_squares,
    "fit": fits,
    "scan": scan,
    "memory": memory,
    "auto": auto,
    "blend": blend,
}


def bench_starts(figure: Path | None = None) -> Iterator[str]:
    """All sections, line by line as they are done; some ten minutes."""
    for name in MODELS:
        model, data = trained(name)
        yield f"{name}, trained on digits at {SIZE}²: top-1 {api.evaluate(model, data.val or ()).top1:.2f}"
    for title, section in SECTIONS.items():
        yield f"\n{title}: {(section.__doc__ or '').strip()}"
        yield from section(figure) if section is auto else section()
