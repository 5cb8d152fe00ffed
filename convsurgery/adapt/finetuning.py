"""Fine-tuning a converted model, with the original as teacher."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from convsurgery.adapt.checkpoints import RunFolder, Saver
from convsurgery.adapt.config import FinetuneConfig, make_config
from convsurgery.adapt.data import load_data
from convsurgery.adapt.processes import make_accelerator
from convsurgery.adapt.progress import Progress, make_progress
from convsurgery.adapt.results import EpochMetrics, FinetuneResult
from convsurgery.adapt.running import device_of, eval_mode
from convsurgery.adapt.trainer import Trainer
from convsurgery.errors import ConvSurgeryError, ModelError, SettingsError, StorageError, warn
from convsurgery.files import alone
from convsurgery.surgery import weights_of

__all__ = ["finetune"]


def finetune(
    model: nn.Module,
    data: Any,
    *,
    teacher: nn.Module | None = None,
    config: FinetuneConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool | str | os.PathLike[str] = False,
    overwrite: bool = False,
    save: Saver | None = None,
    progress: bool = True,
    on_epoch: Callable[[EpochMetrics], object] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    **settings: Any,
) -> FinetuneResult:
    """Train ``model`` in place, on one process or on many.

    The same call serves a plain script, ``accelerate launch`` and ``torchrun``. With a teacher the loss is
    ``(1 - kd_alpha) * cross-entropy + kd_alpha * KL(teacher, model)``, without one it is cross-entropy. The teacher
    is only ever run, in eval mode and without gradients. On return the model holds the weights of the last epoch, on
    the device and with the train flags it came with; so does the teacher. Random states of the process are left as
    they were. On one machine the same seed gives the same weights bit for bit on the CPU, and a resumed run ends where
    an uninterrupted one would have.

    Args:
        model: a classifier with at least one parameter to train.
        data: a :class:`DataSplit`, or anything :func:`load_data` takes: a name, a folder, datasets, loaders.
            Loaders keep their batch size. The seed governs the shuffling of all of them.
        teacher: the original model, or any other with the same classes.
        config: settings; ``**settings`` go over them. See :class:`FinetuneConfig` for names, units and defaults.
        output: folder for ``metrics.csv``, ``best/`` and ``last/``; nothing is written without it.
        resume: True continues the run in ``output``; a path continues the run there. A run stays in its folder, and
            keeps its settings, data and teacher; it may be made longer. One that was cut off before anything was
            finished begins anew.
        overwrite: replace an earlier run in ``output``.
        save: writes a model into a new folder, ``save(model, path)``, including ``model.safetensors``;
            ``convsurgery.save`` when absent.
        progress: False for silence. Otherwise a bar on a terminal and plain lines elsewhere, on standard error.
        on_epoch: called in every process after each epoch, when its files are written; also after the evaluation
            before training, as epoch 0.
        data_dir: folder of named data.
        download: let torchvision fetch named data.
        **settings: fields of :class:`FinetuneConfig`.

    Raises:
        SettingsError: a setting that is not legal; names the range.
        TrainingError: a run that was stopped because its loss or gradients are not finite or its loss diverges. The
            text says where it began and what to change; the model is back at its last good epoch.
        DataError: data that cannot be read or do not fit the model.
        ModelError: a model or teacher that cannot be trained or run on these images.
        StorageError: an output folder in use, also by a run that is under way, or nothing to resume.

    Example::

        new = convsurgery.convert(model, "first-conv->kerv-poly")
        result = convsurgery.finetune(new, "digits", teacher=model, epochs=3, lr=1e-4, output="run")
        print(result.best.val_top1, result.best.agreement)
    """
    settings_ = make_config(config, settings)
    _check_models(model, teacher)
    if teacher is not None and settings_.kd_alpha > 0 and (weights_of(teacher).random or weights_of(teacher).new_head):
        warn(f"the teacher's weights are {weights_of(teacher)}: what it answers is noise, and nothing to be taught")
    if settings_.eval_metric == "agreement" and teacher is None:
        raise SettingsError("eval_metric 'agreement' needs a teacher; choose top1, top5 or loss (--eval-metric)")
    split = load_data(
        data,
        model=model,
        batch_size=settings_.batch_size,
        validation_batch_size=settings_.validation_batch_size,
        root=data_dir,
        workers=settings_.workers,
        seed=settings_.seed,
        augment=not settings_.no_aug,
        download=download,
    )
    folder, resuming = _folders(output, resume, save)
    with ExitStack() as stack:
        stack.enter_context(_own_accelerate())
        accelerator = make_accelerator(settings_)
        stack.enter_context(_random_states(accelerator.device))
        stack.enter_context(_as_before(model, teacher))
        stack.enter_context(_own_sampler(split.train))
        main = accelerator.is_main_process
        reporter: Progress = make_progress(progress and main, settings_.log_interval)
        stack.callback(reporter.close)
        if folder is not None and resuming and folder.begun:
            reporter.note(f"nothing was finished in {folder.path} yet: the run begins anew")
            resuming, overwrite = False, True
        state = None
        if folder is not None and resuming:
            state = folder.read(model)
        elif folder is not None and not overwrite:
            folder.refuse_if_used()
        if folder is not None and main:
            stack.enter_context(alone(folder.path))
        origin = str(weights_of(model))
        trainer = Trainer(accelerator, model, teacher, split, settings_, reporter)
        if state is not None:
            _resume(trainer, state)
        # Nobody may look into the folder any more when the main process begins to write.
        accelerator.wait_for_everyone()
        done = trainer.epochs_done if state is not None else None
        if folder is not None and main:
            folder.begin([vars(row) for row in trainer.history], fresh=state is None)
        trainer.run(folder if main else None, on_epoch)
        notes = () if trainer.result is None else trainer.result.notes
        for note in notes:
            if not note.startswith("agreement"):
                reporter.note(f"in the end {note}")
        result = FinetuneResult(
            tuple(trainer.history),
            trainer.best_epoch,
            settings_,
            folder.path if folder else None,
            folder.files if folder is not None else (),
            done,
            origin,
            notes,
        )
        where = f", in {folder.path / 'best'}" if folder else ""
        reporter.note(f"best epoch {result.best_epoch}{where}; weights before: {origin}")
    return result


def _resume(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put a state that was read from a file into the trainer."""
    try:
        trainer.load_state(state)
    except ConvSurgeryError:
        raise
    except Exception as error:  # a damaged state lacks a key, or holds another kind of value somewhere
        raise StorageError(
            f"the training state in last/ is damaged ({type(error).__name__}: {error!s:.120}); the models in best/ and "
            "last/ can be loaded, the run cannot be continued"
        ) from error


def _check_models(model: nn.Module, teacher: nn.Module | None) -> None:
    device_of(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("the model has no parameter that requires a gradient; there is nothing to train")
    if teacher is None:
        return
    device_of(teacher)
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise ModelError("the teacher shares parameters with the model and would change with it; pass a deep copy")


def _folders(
    output: str | os.PathLike[str] | None, resume: bool | str | os.PathLike[str], save: Saver | None
) -> tuple[RunFolder | None, bool]:
    """The folder of the run, and whether to continue what is in it."""
    path = None if output is None else Path(output).expanduser()
    if not isinstance(resume, bool):
        source = Path(resume).expanduser()
        source = source.parent if source.name == "last" else source
        if path is not None and path.resolve() != source.resolve():
            raise SettingsError(
                f"a run is continued in its own folder: resume={str(source)!r}, but output={str(path)!r}; leave output "
                f"out, or copy the folder first"
            )
        path = source
    if path is None:
        if resume:
            raise SettingsError("resume=True continues the run in output=...; name that folder (--output)")
        return None, False
    if save is None:
        save = _saver()
    return RunFolder(path, save, EpochMetrics.columns()), resume is not False


def _saver() -> Saver:
    """``convsurgery.save``, which reads back what it wrote the first time: later only the weights differ."""
    from convsurgery.surgery import save

    written: list[Path] = []

    def write(model: nn.Module, path: Path) -> object:
        written.append(save(model, path, check=not written))
        return written[-1]

    return write


@contextmanager
def _own_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings once per process and refuses others; give this run a clean slate, then undo it."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kept = [(kind, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState, GradientState)]
    try:
        for kind, _ in kept:
            kind._shared_state.clear()
        yield
    finally:
        for kind, state in kept:
            kind._shared_state.clear()
            kind._shared_state.update(state)


@contextmanager
def _random_states(device: torch.device) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _as_before(model: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Devices and train flags as they were, and no gradients left over."""
    places = [(part, device_of(part)) for part in (model, teacher) if part is not None]
    with eval_mode(model, teacher):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for part, device in places:
                part.to(device)


@contextmanager
def _own_sampler(loader: DataLoader[Any]) -> Iterator[None]:
    """Accelerate puts its sampler into the caller's loader; take it out again."""
    owner = loader.batch_sampler
    if not isinstance(owner, BatchSampler):
        yield
        return
    sampler = owner.sampler
    try:
        yield
    finally:
        owner.sampler = sampler
