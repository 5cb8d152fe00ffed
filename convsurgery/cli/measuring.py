"""Commands that look at images without training: calibrate, scan, choose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsurgery.cli.options import (
    Channels,
    Checkpoint,
    Classes,
    Folder,
    ImageSize,
    Keywords,
    ModelName,
    NewHead,
    Overwrite,
    Pretrained,
    free_output,
    open_model,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DataDir", "Dataset", "Images", "Seed", "calibrate", "calibration_data", "choose", "scan"]

DataDir = Annotated[
    Path | None, typer.Option(help="Folder of images to fit to and measure on, or root of the dataset.")
]
Dataset = Annotated[str | None, typer.Option(help="digits, torch/cifar10, ...: its training images.")]
Images = Annotated[int, typer.Option(help="How many images to use, spread over folders or classes.")]
Seed = Annotated[int, typer.Option(help="Of the choice of images.")]


def calibration_data(model: nn.Module, dataset: str | None, data_dir: Path | None) -> Any:
    """What the options name: the training part of a data set, prepared as in validation, or a folder; None for none."""
    from convsurgery.adapt import load_data

    if dataset is None:
        return data_dir
    return load_data(dataset, model=model, root=data_dir, batch_size=64, augment=False)


def _needed(model: nn.Module, dataset: str | None, data_dir: Path | None) -> Any:
    from convsurgery.errors import DataError

    data = calibration_data(model, dataset, data_dir)
    if data is None:
        raise DataError("no images: give --data-dir FOLDER, or --dataset digits")
    return data


def calibrate(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    teacher: Annotated[str, typer.Option(help="The original model: pretrained, a weight file or a saved folder.")],
    dataset: Dataset = None,
    data_dir: DataDir = None,
    images: Images = 256,
    seed: Seed = 0,
    target: Annotated[float | None, typer.Option(help="Relative error of neutral layers; 1e-3 by default.")] = None,
    batchnorm: Annotated[bool, typer.Option("--batchnorm", help="Fit the BatchNorms' statistics too.")] = False,
    steps: Annotated[int, typer.Option(help="Gradient steps on each fitted layer.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fit a converted model to its original, without training."""
    import convsurgery as cs
    from convsurgery.adapt.calibration import fits_of_model
    from convsurgery.cli.options import original
    from convsurgery.surgery import weights_of

    free_output("calibrate", output, overwrite)
    model = cs.load(folder)
    guide, text = original(teacher, model)
    typer.echo(text)
    data = _needed(model, dataset, data_dir)
    if cs.record(model) is not None and not fits_of_model(model):
        # Of a chain of commands this one has done its part.
        typer.echo("nothing to fit: the layers compute what they did, or begin by weights that are to be trained")
        typer.echo(f"weights: {weights_of(guide)}\nwrote {cs.save(model, output, overwrite=overwrite)}")
        return
    done = cs.calibrate(
        model,
        data,
        teacher=guide,
        images=images,
        seed=seed,
        target=target,
        batchnorm=batchnorm,
        steps=steps,
    )
    typer.echo(str(done))
    typer.echo(f"wrote {cs.save(model, output, overwrite=overwrite)}")


def scan(
    model: ModelName,
    operators: Annotated[str, typer.Option("--operators", help='What to try: "linear-mix | kerv-poly by copy | pnn".')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for scan.json, scan.csv and scan.svg.")],
    where: Annotated[str, typer.Option(help="At which convolutions: the left side of a rule.")] = "all-conv",
    dataset: Dataset = None,
    data_dir: DataDir = None,
    images: Images = 256,
    seed: Seed = 0,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time the layers.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the scan in the output folder.")] = False,
    overwrite: Overwrite = False,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    num_classes: Classes = None,
    img_size: ImageSize = None,
    in_chans: Channels = None,
    model_kwargs: Keywords = None,
    new_head: NewHead = False,
) -> None:
    """Replace one convolution at a time and measure what is lost and saved."""
    import convsurgery as cs
    from convsurgery.adapt.processes import alone_among_processes
    from convsurgery.adapt.progress import LayerProgress

    alone_among_processes("scan")
    source = open_model(model, pretrained, checkpoint, num_classes, img_size, in_chans, model_kwargs, new_head)
    bar = LayerProgress("scanning", None, show=True)
    try:
        found = cs.scan(
            source,
            operators,
            _needed(source, dataset, data_dir),
            where=where,
            images=images,
            seed=seed,
            latency=latency,
            output=output,
            resume=resume,
            overwrite=overwrite,
            on_row=lambda row: bar.done(row.site),
        )
    finally:
        bar.close()
    typer.echo(str(found))
    typer.echo(f"wrote {output}")


def choose(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that scan wrote.")],
    budget: Annotated[str, typer.Option("--budget", "-b", help='What has to hold: "params<=-40%, agreement>=0.98".')],
    curve: Annotated[
        Path | None, typer.Option(help="SVG of the saving against the agreement predicted; needs matplotlib.")
    ] = None,
    metric: Annotated[str, typer.Option(help="The saving on the curve: params, macs or latency.")] = "params",
    overwrite: Overwrite = False,
) -> None:
    """Choose what to replace under a budget, from a scan; prints the rule that does it."""
    import convsurgery as cs
    from convsurgery.adapt.choose import Point
    from convsurgery.adapt.scan import Scan

    if curve is not None:
        free_output("choose", curve, overwrite, folder=False)
    found = Scan.load(folder)
    choice = cs.choose(found, budget)
    typer.echo(str(choice))
    typer.echo(f"\n--rule '{choice.rule}'")
    if curve is not None:
        choices = cs.trade_off(found, metric=metric)
        points = [Point(-(getattr(each.predicted, metric) or 0.0), each.predicted.agreement) for each in choices]
        cs.draw_trade_off(points, curve)
        typer.echo(f"wrote {curve}")
