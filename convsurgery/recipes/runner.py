"""Carrying out a recipe, step by step, with what each step did on the terminal."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from convsurgery import api
from convsurgery.adapt.auto import auto_rule
from convsurgery.adapt.calibration import Calibration
from convsurgery.adapt.data import DataSplit, load_data
from convsurgery.adapt.evaluation import EvalResult
from convsurgery.adapt.fitting import LayerFit
from convsurgery.adapt.images import Images, calibration_images
from convsurgery.adapt.processes import alone_among_processes
from convsurgery.errors import RecipeError
from convsurgery.files import alone
from convsurgery.recipes.schema import CalibrateStep, ConvertStep, Recipe
from convsurgery.rules import as_rules
from convsurgery.surgery import named_folder

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_recipe"]


def run_recipe(recipe: Recipe, *, overwrite: bool = False, console: Console | None = None) -> nn.Module:
    """Model → (training) → conversion → calibration → fine-tuning → export; writes the recipe's output folder.

    Args:
        recipe: from :func:`read_recipe`.
        overwrite: replace what an earlier run left in the folder.
        console: where to print; standard output when absent.

    Returns:
        The model in the end, on the CPU, in eval mode.

    Raises:
        RecipeError: when the folder holds an earlier run.
        ConvSurgeryError: whatever a step raises.
    """
    from rich.console import Console as RichConsole

    return _Run(recipe, overwrite, console or RichConsole(highlight=False)).run()


class _Run:
    def __init__(self, recipe: Recipe, overwrite: bool, console: Console) -> None:
        self.recipe, self.overwrite, self.console = recipe, overwrite, console
        self.folder = Path(recipe.output).expanduser()
        self.number = 0
        self.rows: list[tuple[str, EvalResult]] = []
        self.notes: list[str] = []

    def run(self) -> nn.Module:
        alone_among_processes("run")
        if self.folder.exists() and not self.folder.is_dir():
            raise RecipeError(f"{self.folder} is no folder: name another output")
        if self.folder.exists() and any(self.folder.iterdir()) and not self.overwrite:
            raise RecipeError(f"{self.folder} holds an earlier run: name another output, or overwrite it (--overwrite)")
        began = time.perf_counter()
        torch.manual_seed(self.recipe.seed)
        model, data = self._read()
        with alone(self.folder):
            return self._run(model, data, began)

    def _read(self) -> tuple[nn.Module, Any]:
        """Model, rules and data, before anything takes time or is written."""
        recipe, model = self.recipe, self._model()
        if recipe.convert is not None:
            rules = as_rules(recipe.convert.rule)
            if auto_rule(rules) is None:
                api.plan(model, rules, start=recipe.convert.start)
            elif recipe.calibrate is None:
                raise RecipeError("auto(...) chooses by measurement: give the recipe a step calibrate, with images")
        return model, self._data(model, augment=True)

    def _run(self, model: nn.Module, data: Any, began: float) -> nn.Module:
        recipe = self.recipe
        if recipe.pretrain is not None:
            self._say(f"train {recipe.model.name}")
            api.finetune(model, data, config=recipe.pretrain)
        self._measure("original", model, data)
        new = copy.deepcopy(model) if recipe.convert is None else self._converted(model, recipe.convert)
        if recipe.convert is not None:
            self._measure("converted", new, data, model)
        if recipe.finetune is not None:
            self._say("fine-tune")
            # "start" as on the command line: the model as it stands before training
            teacher = {"original": model, "start": copy.deepcopy(new), "none": None}[recipe.finetune.teacher]
            api.finetune(
                new,
                data,
                teacher=teacher,
                config=recipe.finetune.settings,
                output=self.folder / "finetuned",
                overwrite=self.overwrite,
            )
            self._measure("fine-tuned", new, data, model)
        written = [api.save(new, self.folder / "model")]
        if recipe.export is not None:
            self._say("export")
            step = recipe.export
            target = self.folder / step.file
            parity = api.export_onnx(
                new,
                target,
                inline=step.inline,
                opset=step.opset,
                verify=step.verify,
                data=data.val.dataset if step.images and step.verify else None,
                images=step.images or 64,
                seed=recipe.seed,
                tolerance=step.tolerance,
                dynamic_batch=step.dynamic_batch,
                overwrite=self.overwrite,
            )
            self.console.print(f"{target.name}: {parity or 'not compared (verify: false)'}")
            written.append(target)
        self._table(model, new)
        self.console.print(
            f"\nwrote {', '.join(map(str, written))} in {time.perf_counter() - began:.0f} s", soft_wrap=True
        )
        return new

    def _note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def _say(self, what: str) -> None:
        self.number += 1
        self.console.print(f"\n{self.number}. {what}", soft_wrap=True, markup=False)

    def _model(self) -> nn.Module:
        step = self.recipe.model
        folder, note = named_folder(step.name)
        if note:
            self._note(note)
        if folder is not None:
            settled = (step.pretrained, step.checkpoint, step.num_classes, step.img_size, step.kwargs)
            if any(settled):
                raise RecipeError(f"{step.name} is a saved model: its weights, classes, size and arguments are settled")
            return api.load(folder)
        return api.create_model(
            step.name,
            pretrained=step.pretrained,
            checkpoint=step.checkpoint,
            num_classes=step.num_classes,
            img_size=step.img_size,
            **(step.kwargs or {}),
        )

    def _data(self, model: nn.Module, *, augment: bool) -> DataSplit:
        step, settings = self.recipe.data, self.recipe.finetune
        tuned = settings.settings if settings is not None else None
        return load_data(
            step.dataset or str(step.dir),
            model=model,
            root=step.dir if step.dataset else None,
            batch_size=tuned.batch_size if tuned else 128,
            validation_batch_size=tuned.validation_batch_size if tuned else None,
            workers=tuned.workers if tuned else 0,
            seed=self.recipe.seed,
            augment=augment and not (tuned is not None and tuned.no_aug),
            download=step.download,
        )

    def _converted(self, model: nn.Module, step: ConvertStep) -> nn.Module:
        self._say(f"convert: {step.rule}")
        images = self._images(model)
        layers: list[LayerFit] = []
        wanted = self.recipe.calibrate
        new = api.convert(model, step.rule, start=step.start, calibration=images, on_layer=layers.append)
        if layers and images is not None and wanted is not None and wanted != CalibrateStep(wanted.images):
            # Fitted once more, by the settings that convert has not.
            layers.clear()
            api.calibrate(
                new,
                images,
                teacher=model,
                target=wanted.target,
                batchnorm=wanted.batchnorm,
                steps=wanted.steps,
                progress=False,
                on_layer=layers.append,
            )
        done = api.record(new)
        self.console.print(str(done.plans[-1] if done else ""), markup=False)
        if layers and images is not None:
            self._say(f"calibrated on {images}")
            self.console.print(str(Calibration(tuple(layers))), markup=False)
        return new

    def _images(self, model: nn.Module) -> Images | None:
        """Training images, as validation would see them, evenly over the classes."""
        step = self.recipe.calibrate
        if step is None:
            return None
        data = self._data(model, augment=False)
        return calibration_images(data, model, images=step.images, seed=self.recipe.seed)

    def _measure(self, label: str, model: nn.Module, data: DataSplit, teacher: nn.Module | None = None) -> None:
        if data.val is not None:
            result = api.evaluate(model, data.val, teacher=teacher)
            self.rows.append((label, result))
            self.notes += [f"{label}: {note}" for note in result.notes]

    def _table(self, model: nn.Module, new: nn.Module) -> None:
        from rich import box
        from rich.table import Table

        if not self.rows:
            return
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in ("", "top-1", "answers kept", "parameters"):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        before, after = (sum(p.numel() for p in part.parameters()) for part in (model, new))
        for label, result in self.rows:
            kept = "" if result.kept is None else f"{result.kept} of {result.samples}"
            table.add_row(label, f"{result.top1:.2f}", kept, f"{before if label == 'original' else after:,}")
        self.console.print()
        self.console.print(table)
        self.console.print(f"weights of the original: {self.rows[0][1].weights}", markup=False)
        for note in self.notes:
            self.console.print(note, markup=False)
