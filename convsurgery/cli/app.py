"""The commands. Only what a command needs is imported, inside it: ``--help`` loads no torch."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsurgery.cli.coverage import coverage
from convsurgery.cli.measuring import DataDir, Dataset, Images, Seed, calibrate, calibration_data, choose, scan
from convsurgery.cli.options import (
    AsJson,
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
    RuleText,
    StartText,
    free_output,
    open_model,
    teacher_named,
)

if TYPE_CHECKING:
    pass

__all__ = ["build"]


def build() -> typer.Typer:
    """The command-line application."""
    app = typer.Typer(
        name="convsurgery",
        help="Replace the convolutions of pretrained vision models, and keep what they predict.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_root)
    for command in (
        *(plan, convert, calibrate, scan, choose, _finetune_command()),
        *(export, verify, ops, demo, bench, coverage, run),
    ):
        app.command()(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from convsurgery import __version__

        typer.echo(f"convsurgery {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


def plan(
    model: ModelName,
    rule: RuleText,
    start: StartText = None,
    num_classes: Classes = None,
    img_size: ImageSize = None,
    in_chans: Channels = None,
    model_kwargs: Keywords = None,
    as_json: AsJson = False,
) -> None:
    """Show what convert would do; no weights are loaded."""
    import convsurgery as cs

    built = open_model(
        model, num_classes=num_classes, img_size=img_size, in_chans=in_chans, model_kwargs=model_kwargs, meta=True
    )
    made = cs.plan(built, rule, start=start)
    typer.echo(made.to_json(indent=1) if as_json else str(made))


def convert(
    model: ModelName,
    rule: RuleText,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    start: StartText = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    num_classes: Classes = None,
    img_size: ImageSize = None,
    in_chans: Channels = None,
    model_kwargs: Keywords = None,
    new_head: NewHead = False,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    images: Images = 256,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Convert a model and save it as a folder; with images, fit what can be fitted."""
    import convsurgery as cs
    from convsurgery.adapt.calibration import Calibration
    from convsurgery.adapt.fitting import LayerFit
    from convsurgery.adapt.images import calibration_images

    free_output("convert", output, overwrite)
    source = open_model(model, pretrained, checkpoint, num_classes, img_size, in_chans, model_kwargs, new_head)
    data = calibration_data(source, dataset, data_dir)
    if data is not None:
        data = calibration_images(data, source, images=images, seed=seed)
    layers: list[LayerFit] = []
    new = cs.convert_(source, rule, start=start, calibration=data, on_layer=layers.append)
    folder = cs.save(new, output, overwrite=overwrite)
    done = cs.record(new)
    typer.echo(str(done.plans[-1] if done else ""))
    if layers:
        typer.echo(f"\n{Calibration(tuple(layers), str(data))}\n")
    typer.echo(f"wrote {folder}")


def _finetune_command() -> Any:
    """``finetune``, with one option for each field of FinetuneConfig: no list of settings is kept twice."""
    from convsurgery.adapt.config import FinetuneConfig

    knobs = {field.name: field for field in fields(FinetuneConfig)}

    def finetune(
        folder: Folder,
        output: Annotated[Path, typer.Option("--output", "-o", help="Folder for best/, last/ and metrics.csv.")],
        data_dir: Annotated[
            Path | None, typer.Option(help="Folder of images with train/ and val/, or root of the dataset.")
        ] = None,
        dataset: Annotated[str | None, typer.Option(help="digits, torch/cifar10, ...; a folder needs none.")] = None,
        dataset_download: Annotated[
            bool, typer.Option("--dataset-download", help="Let torchvision fetch the dataset.")
        ] = False,
        teacher: Annotated[
            str | None,
            typer.Option(
                help="start (the model before training), pretrained, a folder, a weight file, or none. "
                "By default start, where every start keeps the function, else none."
            ),
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
        **settings: Any,
    ) -> None:
        """Train a converted model, with the original as its teacher."""
        import convsurgery as cs
        from convsurgery.errors import DataError

        if dataset is None and data_dir is None:
            raise DataError("no data: give --data-dir FOLDER (with train/ and val/), or --dataset digits")
        model = cs.load(folder)
        guide, text = teacher_named(teacher, model)
        typer.echo(text)
        given = {name: _value(knobs[name], value) for name, value in settings.items()}
        result = cs.finetune(
            model,
            dataset or str(data_dir),
            teacher=guide,
            output=output,
            resume=resume,
            overwrite=overwrite,
            data_dir=data_dir if dataset else None,
            download=dataset_download,
            **given,
        )
        typer.echo(f"weights before: {result.weights}")
        for note in result.notes:
            typer.echo(note)
        best = result.best
        if best.val_top1 is not None:
            before = f" (before training {result.initial.val_top1:.2f})" if result.initial.val_top1 is not None else ""
            typer.echo(f"best epoch {best.epoch}: top-1 {best.val_top1:.2f} %{before}")
        typer.echo("wrote " + ", ".join(str(path) for path in result.files))

    signature = inspect.signature(finetune, eval_str=True)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [*named, *(_option(field) for field in knobs.values())]
    finetune.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    finetune.__annotations__ = {p.name: p.annotation for p in parameters}
    return finetune


def _option(field: Any) -> inspect.Parameter:
    """A settings field as a typer parameter; tuples are written with commas."""
    flag = "--" + field.name.replace("_", "-")
    kind = str(field.type).removesuffix(" | None")
    python: Any = {"int": int, "float": float, "bool": bool}.get(kind, str)
    default = field.default
    if kind.startswith("tuple") and default is not None:
        default = ",".join(map(str, default))
    short = {"batch_size": ("-b",)}.get(field.name, ())
    option = typer.Option(*([flag, *short]), help=field.metadata["help"].capitalize() + ".")
    if python is bool and not field.name.startswith("no_"):
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=field.metadata["help"].capitalize() + ".")
    annotation: Any = Annotated[python | None if field.default is None else python, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(field: Any, value: Any) -> Any:
    """What the settings want for what the command line gave."""
    if value is None or not str(field.type).startswith("tuple"):
        return value
    number = int if "int" in str(field.type) else float
    try:
        return tuple(number(part) for part in str(value).split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"--{field.name.replace('_', '-')} takes numbers with commas, not {value!r}") from None


def export(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    inline: Annotated[bool, typer.Option("--inline", help="Standard ONNX operators only.")] = False,
    opset: Annotated[int | None, typer.Option(help="Opset of the standard operators, 18 to 23; 18 by default.")] = None,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch before writing.")] = True,
    tolerance: Annotated[float, typer.Option(help="Largest error allowed, relative to the largest output.")] = 1e-4,
    static_batch: Annotated[bool, typer.Option("--static-batch", help="Fix the batch size (at 2).")] = False,
    diffusion: Annotated[
        str, typer.Option(help="Implicit diffusion steps: matmul, or truncate:1e-3 for a small kernel.")
    ] = "matmul",
    overwrite: Overwrite = False,
) -> None:
    """Write a saved model as ONNX, verified in ONNX Runtime."""
    import convsurgery as cs

    free_output("export", output, overwrite, folder=False)
    parity = cs.export_onnx(
        cs.load(folder),
        output,
        inline=inline,
        opset=opset,
        verify=check,
        tolerance=tolerance,
        dynamic_batch=not static_batch,
        diffusion=diffusion,
        overwrite=overwrite,
    )
    typer.echo(str(parity) if parity else "not verified")
    typer.echo(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The .onnx file.")],
    against: Annotated[Path, typer.Option(help="Folder of the model it was made from.")],
    tolerance: Annotated[float, typer.Option(help="Largest error allowed, relative to the largest output.")] = 1e-4,
) -> None:
    """Compare an ONNX file with a saved model; exit code 1 when they differ."""
    import convsurgery as cs

    typer.echo(str(cs.verify_onnx(file, cs.load(against), tolerance=tolerance)))


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; examples/recipes has some.")],
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value: --set finetune.epochs=1.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Convert, calibrate, fine-tune and export, all from one file."""
    from convsurgery.recipes import read_recipe, run_recipe

    run_recipe(read_recipe(recipe, change or ()), overwrite=overwrite)


def ops(as_json: AsJson = False) -> None:
    """List operators with their arguments, and the places that rules can name."""
    from convsurgery.cli.catalogue import catalogue, catalogue_text

    typer.echo(json.dumps(catalogue(), indent=1, ensure_ascii=False) if as_json else catalogue_text())


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("convsurgery-demo"),
    seed: Annotated[int, typer.Option(help="Of training.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """The whole way on scikit-learn's digits: train, convert, fine-tune, export, verify, time. Under 3 minutes."""
    from convsurgery.cli.demo import run_demo

    run_demo(output, seed, overwrite=overwrite)


def bench(
    what: Annotated[str, typer.Argument(help="ops, diffusion, onnx, convert, starts, or all but starts.")] = "all",
    repeats: Annotated[int, typer.Option(help="Rounds; medians are shown.")] = 30,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    as_json: AsJson = False,
    figure: Annotated[Path | None, typer.Option(help="SVG of the diffusion or starts part; needs matplotlib.")] = None,
) -> None:
    """Measure the operators against F.conv2d, and converting against timm's tracing."""
    from convsurgery.bench import run_bench

    typer.echo(run_bench(what, repeats, threads, as_json, figure))
