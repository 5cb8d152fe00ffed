"""Accuracy and agreement, counted over samples."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.adapt.config import FinetuneConfig
from convsurgery.adapt.footing import chance, no_better, one_class, warn_of_random
from convsurgery.adapt.images import Images
from convsurgery.adapt.losses import check_labels, logits_of
from convsurgery.adapt.running import device_of, eval_mode
from convsurgery.adapt.validating import validation_data
from convsurgery.errors import DataError, ModelError, SettingsError
from convsurgery.surgery import weights_of

__all__ = ["EvalResult", "count", "evaluate", "evaluate_labelled", "summarise", "told_before", "unpack"]

# correct, correct among five, same answer as the teacher, samples, answered correctly by the teacher
_COUNTS = 5


@dataclass(frozen=True)
class EvalResult:
    """What :func:`evaluate` found; prints as a few lines.

    Attributes:
        top1: samples answered correctly, in percent.
        top5: samples whose label is among the five highest scores, in percent.
        loss: mean cross-entropy, in nats.
        samples: how many there were.
        agreement: samples answered as the teacher answers them, in percent; None without a teacher, and where the
            teacher gives all of them the same class, which ``notes`` then say.
        kept: the same as a count.
        majority: samples of the most frequent class, in percent: what always answering it would give.
        teacher_top1: samples the teacher answers correctly, in percent; None without a teacher.
        weights: where the model's weights come from, as far as it is known.
        data: which samples these were.
        notes: what else there is to say: answers no better than chance, an agreement that says nothing.
    """

    top1: float
    top5: float
    loss: float
    samples: int
    agreement: float | None = None
    kept: int | None = None
    majority: float | None = None
    teacher_top1: float | None = None
    weights: str = ""
    data: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f} on {self.samples:,} images"]
        if self.kept is not None:
            lines.append(f"answers kept: {self.kept:,} of {self.samples:,} ({self.agreement:.2f} %)")
        lines += [f"images: {self.data}"] * bool(self.data) + [f"weights: {self.weights}"] * bool(self.weights)
        return "\n".join([*lines, *self.notes])


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    teacher: nn.Module | None = None,
    images: int | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
    workers: int = 4,
) -> EvalResult:
    """Run ``model`` in eval mode over the validation data and count.

    Every sample counts once, whatever the size of its batch. A sample with a score that is not finite counts as wrong
    and as not kept. The models stay on their devices, and their train flags are as before afterwards.

    Args:
        model: a classifier; its scores have shape ``(N, C)``.
        data: whatever :func:`finetune` takes, of which the validation part is meant: a name, a folder with ``val/``, a
            pair (train, val) of datasets or loaders, a :class:`DataSplit`; or one dataset or loader to evaluate on, or
            another iterable of batches ``(images, labels)``.
        teacher: a classifier to compare the answers with.
        images: how many to use at most: of a dataset a part drawn from the whole, evenly over its classes, of a loader
            or another iterable the first ones.
        seed: of the draw.
        data_dir: folder of named data.
        workers: loader processes for images read from disk.

    Returns:
        The counts. Agreement is left out where the teacher gives all samples the same class: anything that answers so
        would keep all of its answers.

    Raises:
        DataError: no samples, a batch of another form, or a label the model has no output for.

    Example::

        result = convsurgery.evaluate(new, data, teacher=model)
        print(result)
    """
    warn_of_random(model=model, teacher=teacher)
    loader = validation_data(data, model, images, seed, data_dir, workers)
    with eval_mode(model, teacher):
        sums = count(model, loader, teacher=teacher, device=device_of(model))
    return replace(summarise(sums, teacher is not None), weights=str(weights_of(model)), data=str(loader))


def evaluate_labelled(model: nn.Module, images: Images) -> EvalResult | None:
    """``model`` on images of which labels are known that it has outputs for; None where they are not."""
    batches = images.labelled()
    first = next(batches, None)
    if first is None or first[1] is None:
        return None
    try:
        with eval_mode(model):
            sums = count(model, itertools.chain([first], batches), teacher=None, device=device_of(model))
    except (DataError, ModelError):  # labels of something else, a model that answers with no scores
        return None
    return summarise(sums, compared=False)


def unpack(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch."""
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        images, targets = batch[0], batch[1]
        if isinstance(images, Tensor) and isinstance(targets, Tensor):
            return images, targets
    raise DataError(f"a batch must be a pair of tensors (images, labels), not {type(batch).__name__}")


def count(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    teacher: nn.Module | None,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    classes: int = 0,
) -> Tensor:
    """Sums over the samples, float64 on the CPU: the counts, the cross-entropy, how often each class occurs among the
    labels (C,), and how often the teacher answers with it (C,).

    Sums, not means, so that those of several processes can be added; ``classes`` is C, for a process that gets no
    batch. The models must be in eval mode already.
    """
    counts: list[Tensor] = []
    losses: list[Tensor] = []
    occurring: list[Tensor] = []
    teacher_device = device if teacher is None else device_of(teacher)
    for batch in loader:
        images, targets = unpack(batch)
        inputs = images.to(device, non_blocking=True)
        with torch.no_grad(), autocast():
            logits = logits_of(model(inputs)).float()
            reference = None if teacher is None else logits_of(teacher(images.to(teacher_device))).float()
        classes = logits.shape[1]
        check_labels(targets, classes)
        labels = targets.to(device, non_blocking=True)
        finite = logits.isfinite().all(dim=1)
        # -1 is no class: argmax would call a NaN the answer.
        ranked = logits.topk(min(5, classes), dim=1).indices.masked_fill(~finite[:, None], -1)
        hits = ranked == labels[:, None]
        same, answered, taught = finite, labels[:0], finite
        if reference is not None:
            if reference.shape != logits.shape:
                raise ModelError(
                    f"the teacher answers with {reference.shape[1]} classes, the model with {classes}; "
                    f"their answers cannot be compared (--num-classes)"
                )
            sound = reference.isfinite().all(dim=1).to(device)
            wanted = reference.argmax(dim=1).to(device)
            same, answered = (ranked[:, 0] == wanted) & sound, wanted[sound]
            taught = (wanted == labels) & sound
        size = hits.new_tensor(len(hits), dtype=torch.int64)
        counts.append(torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), same.sum(), size, taught.sum()]))
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        occurring.append(torch.cat([labels.bincount(minlength=classes), answered.bincount(minlength=classes)]))
    sums = torch.zeros(_COUNTS + 1 + 2 * classes, dtype=torch.float64)
    # One transfer at the end: reading a number per batch would make the device wait each time.
    if counts:
        sums[:_COUNTS] = torch.stack(counts).cpu().double().sum(0)
        sums[_COUNTS] = torch.stack(losses).cpu().double().sum()
        sums[_COUNTS + 1 :] = torch.stack(occurring).cpu().double().sum(0)
    return sums


def summarise(sums: Tensor, compared: bool, what: str = "the model") -> EvalResult:
    """Percentages and means of the sums of :func:`count`."""
    correct, five, same, samples, taught, loss = sums[: _COUNTS + 1].tolist()
    if not samples:
        raise DataError("the validation data hold no samples")
    labels, answered = sums[_COUNTS + 1 :].chunk(2)
    refused = one_class(answered, "teacher") if compared else None
    told = compared and refused is None
    notes = (refused and f"agreement {refused}", chance(round(correct), labels, what))
    return EvalResult(
        top1=100 * correct / samples,
        top5=100 * five / samples,
        loss=loss / samples,
        samples=int(samples),
        agreement=100 * same / samples if told else None,
        kept=int(same) if told else None,
        majority=100 * float(labels.max()) / samples,
        teacher_top1=100 * taught / samples if compared else None,
        notes=tuple(note for note in notes if note),
    )


def told_before(result: EvalResult | None, config: FinetuneConfig, *, distilling: bool) -> list[str]:
    """What there is to say of a run before it trains: an agreement that says nothing, a teacher that teaches nothing.

    Raises:
        SettingsError: where the best epoch was to be found by such an agreement.
    """
    if result is None:
        return []
    notes = [note for note in result.notes if note.startswith("agreement")]
    if notes and config.eval_metric == "agreement":
        raise SettingsError(f"eval_metric cannot be agreement (--eval-metric): {notes[0]}; choose top1, top5 or loss")
    if distilling and result.teacher_top1 is not None and result.majority is not None:
        right, most = (round(share * result.samples / 100) for share in (result.teacher_top1, result.majority))
        if no_better(right, most, result.samples):
            notes.append(
                f"the teacher is right on {result.teacher_top1:.2f} % of the images, the most frequent class is "
                f"{result.majority:.2f} %: it has nothing to teach, give another one or none (--teacher none)"
            )
    return notes
