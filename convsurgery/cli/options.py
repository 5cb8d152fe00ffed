"""Arguments that several commands share, and the models they name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "AsJson",
    "Channels",
    "Checkpoint",
    "Classes",
    "Folder",
    "ImageSize",
    "Keywords",
    "ModelName",
    "NewHead",
    "Overwrite",
    "Pretrained",
    "RuleText",
    "StartText",
    "free_output",
    "open_model",
    "original",
    "teacher_named",
]

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="timm's name, torchvision/NAME, or a folder that convert wrote: ./out.")
]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that convert or finetune wrote.")]
RuleText = Annotated[
    str, typer.Option("--rule", "-r", help="Which convolutions become what, e.g. first-conv->kerv-poly.")
]
StartText = Annotated[
    str | None,
    typer.Option(
        metavar="START",
        help="How new operators begin whose rule does not say: neutral(1e-3), fit, blend, copy, project or random.",
    ),
]
Classes = Annotated[int | None, typer.Option(help="Classes of the model's head.")]
ImageSize = Annotated[int | None, typer.Option(help="Height and width of the input in pixels.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load the published weights.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Load weights from a file: .safetensors, or .pth (tensors only, no code).")
]
Channels = Annotated[int | None, typer.Option("--in-chans", help="Channels of the input image.")]
Keywords = Annotated[
    list[str] | None,
    typer.Option("--model-kwargs", metavar="NAME=VALUE", help="Further argument of the model's builder; repeatable."),
]
NewHead = Annotated[
    bool, typer.Option("--new-head", help="Keep a fresh classifier where the checkpoint has other classes.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def free_output(command: str, output: Path, overwrite: bool, *, folder: bool = True) -> None:
    """Before anything takes time: one process, and an output that is not there yet unless it may be replaced."""
    from convsurgery.adapt.processes import alone_among_processes
    from convsurgery.files import refuse_existing

    alone_among_processes(command)
    if not overwrite:
        refuse_existing(output, folder=folder)


def open_model(
    name: str,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
    model_kwargs: list[str] | None = None,
    new_head: bool = False,
    meta: bool = False,
) -> nn.Module:
    """The model a command-line argument names: a saved folder, or a model to build."""
    import convsurgery as cs
    from convsurgery.errors import ModelError
    from convsurgery.surgery import named_folder

    folder, note = named_folder(name)
    if note:
        typer.echo(note, err=True)
    if folder is not None:
        if pretrained or checkpoint or num_classes or img_size or in_chans or model_kwargs or new_head:
            raise ModelError(
                f"{name} is a saved model: --pretrained, --checkpoint, --new-head, --num-classes, --img-size, "
                "--in-chans and --model-kwargs are settled"
            )
        return cs.load(folder)
    return cs.create_model(
        name,
        pretrained=pretrained,
        checkpoint=checkpoint,
        num_classes=num_classes,
        img_size=img_size,
        device="meta" if meta else None,
        new_head=new_head,
        **({} if in_chans is None else {"in_chans": in_chans}),
        **_keywords(model_kwargs or ()),
    )


def _keywords(texts: Iterable[str]) -> dict[str, Any]:
    """``name=value`` texts as arguments; values as YAML has them: numbers, true, null, [1, 2], words."""
    import yaml

    from convsurgery.errors import ModelError

    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip().isidentifier():
            raise ModelError(f"--model-kwargs {text}: written name=value, e.g. --model-kwargs drop_path_rate=0.1")
        if name.strip() in found:
            raise ModelError(f"--model-kwargs {name.strip()} is given twice")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ModelError(f"--model-kwargs {text}: {value!r} is no number, word or list") from None
    return found


def teacher_named(wanted: str | None, model: nn.Module) -> tuple[nn.Module | None, str]:
    """The teacher that ``--teacher`` names, and how to print it."""
    import copy

    import convsurgery as cs
    from convsurgery import zoo
    from convsurgery.errors import ModelError
    from convsurgery.files import is_folder_with
    from convsurgery.surgery import weights_of
    from convsurgery.surgery.storage import CONFIG

    if wanted is None:
        done = cs.record(model)
        kept = done is not None and all(entry.exactness in ("exact", "approximate") for entry in done.edits)
        origin = weights_of(model)
        if kept and (origin.random or origin.new_head):
            what = "weights are" if origin.random else "classifier is"
            return None, f"no teacher: the model's {what} random, and teach nothing; plain cross-entropy"
        wanted = "start" if kept else "none"
    if wanted == "none":
        return None, "no teacher: plain cross-entropy"
    if wanted == "start":
        return copy.deepcopy(model), "teacher: the model as it stands before training"
    if wanted != "pretrained" and is_folder_with(wanted, CONFIG):
        return cs.load(wanted), f"teacher: {wanted}"
    base = zoo.identify(model)
    if wanted == "pretrained" or os.path.isfile(wanted):
        if base is None:
            raise ModelError("the folder does not name its base model: give the teacher as a folder")
        checkpoint = None if wanted == "pretrained" else Path(wanted)
        teacher = cs.create_model(base.name, pretrained=checkpoint is None, checkpoint=checkpoint, **dict(base.kwargs))
        return teacher, f"teacher: {base.name} with weights of {wanted}"
    raise ModelError(f"--teacher {wanted}: no such folder or file; or say start, pretrained or none")


def original(wanted: str, model: nn.Module) -> tuple[nn.Module, str]:
    """The unconverted model that ``--teacher`` names: pretrained, a folder or a weight file."""
    from convsurgery.errors import ModelError

    found, text = teacher_named(wanted, model)
    if found is None or wanted == "start":
        raise ModelError(f"--teacher {wanted}: here it is the model before conversion: pretrained, a folder or a file")
    return found, text
