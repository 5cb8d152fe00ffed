"""Does the noise of a perturbation layer do anything? The control that the literature lacks, on scikit-learn's digits.

Three ResNet-18s, trained from scratch by the same recipe over several seeds: with 3x3 convolutions; with perturbation
layers in their place; and with the very same layers without noise, which are relu and a 1x1 convolution. Widths are
chosen so that all three have the same number of parameters. Accuracy is counted over samples, in the last epoch.

    python examples/pnn_control.py --seeds 5
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import nn

import convsurgery as cs

PLACES = "conv[in=BasicBlock, k=3]"


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build(width: int, operator: str | None, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = cs.create_model("scaled_resnet18", num_classes=10, img_size=32, in_chans=1, width=width)
    if operator is None:
        return model
    return cs.convert(model, f"{PLACES}->{operator}", start=f"random({seed})")


def accuracy(model: nn.Module, seed: int, epochs: int) -> float:
    """Top-1 in percent of the 450 held-out digits, after the last epoch."""
    result = cs.finetune(
        model, "digits", epochs=epochs, batch_size=64, lr=3e-3, weight_decay=0.01, warmup_epochs=1, seed=seed,
        progress=False,
    )  # fmt: skip
    return float(result.last.val_top1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--width", type=int, default=16, help="of the network with 3x3 convolutions")
    options = parser.parse_args()
    wanted = parameters(build(options.width, None, 0))
    widths = range(options.width, 4 * options.width)
    wide = min(widths, key=lambda width: abs(parameters(build(width, "pnn", 0)) - wanted))
    print(f"{'':22} width  parameters  top-1: mean ± std over {options.seeds} seeds (each)")
    for label, operator, width in (
        ("3x3 convolutions", None, options.width),
        ("pnn(level=0.1)", "pnn(level=0.1, seed={seed})", wide),
        ("pnn(level=0.5)", "pnn(level=0.5, seed={seed})", wide),
        ("pnn(noise=none)", "pnn(noise=none)", wide),
    ):
        found = []
        for seed in range(options.seeds):
            model = build(width, operator and operator.format(seed=seed), seed)
            found.append(accuracy(model, seed, options.epochs))
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        each = " ".join(f"{value:.2f}" for value in found)
        count = parameters(model)
        print(f"{label:22} {width:5}  {count:10,}  {statistics.mean(found):.2f} ± {spread:.2f} ({each})", flush=True)


if __name__ == "__main__":
    main()
