"""Accuracy and agreement, counted over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.adapt.losses import check_labels, logits_of
from convsurgery.errors import DataError, ModelError

__all__ = ["EvalResult", "evaluate", "unpack"]

# correct, correct among five, same answer as the teacher, samples
_COUNTS = 4


@dataclass(frozen=True)
class EvalResult:
    """What :func:`evaluate` found.

    Attributes:
        top1: samples answered correctly, in percent.
        top5: samples whose label is among the five highest scores, in percent.
        loss: mean cross-entropy, in nats.
        samples: how many there were.
        agreement: samples answered as the teacher answers them, in percent; None without a teacher.
        kept: the same as a count.
    """

    top1: float
    top5: float
    loss: float
    samples: int
    agreement: float | None = None
    kept: int | None = None


def evaluate(model: nn.Module, loader: Iterable[Any], *, teacher: nn.Module | None = None) -> EvalResult:
    """Run ``model`` in eval mode over ``loader`` and count.

    Every sample counts once, whatever the size of its batch. A sample with a score that is not finite counts as wrong
    and as not kept. The models stay on their devices, and their train flags are as before afterwards.

    Args:
        model: a classifier; its scores have shape ``(N, C)``.
        loader: batches ``(images, labels)``.
        teacher: a classifier to compare the answers with.

    Raises:
        DataError: no samples, a batch of another form, or a label the model has no output for.

    Example::

        result = convsurgery.evaluate(new, data.val, teacher=model)
        print(f"{result.top1:.2f} %, {result.kept} of {result.samples} answers kept")
    """
    with eval_mode(model, teacher):
        sums = count(model, loader, teacher=teacher, device=device_of(model))
    return summarise(sums, teacher is not None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's tensors are; the CPU for a model without any.

    Raises:
        ModelError: they are on several devices, or on ``meta``, where there are no values.
    """
    devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    if len(devices) > 1:
        raise ModelError("the model lies on several devices: " + ", ".join(sorted(map(str, devices))))
    device = devices.pop() if devices else torch.device("cpu")
    if device.type == "meta":
        raise ModelError("the model is on the meta device and has no weights; load them first")
    return device


@contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Eval mode inside, and every module's own train flag back afterwards."""
    flags = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        for model in models:
            if model is not None:
                model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


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
) -> Tensor:
    """Sums over the samples, float64 on the CPU: the counts, then the cross-entropy.

    Sums, not means, so that those of several processes can be added. The models must be in eval mode already.
    """
    counts: list[Tensor] = []
    losses: list[Tensor] = []
    teacher_device = device if teacher is None else device_of(teacher)
    for batch in loader:
        images, targets = unpack(batch)
        inputs = images.to(device, non_blocking=True)
        with torch.no_grad(), autocast():
            logits = logits_of(model(inputs)).float()
            reference = None if teacher is None else logits_of(teacher(images.to(teacher_device))).float()
        check_labels(targets, logits.shape[1])
        labels = targets.to(device, non_blocking=True)
        finite = logits.isfinite().all(dim=1)
        # -1 is no class: argmax would call a NaN the answer.
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices.masked_fill(~finite[:, None], -1)
        hits = ranked == labels[:, None]
        same = finite
        if reference is not None:
            if reference.shape != logits.shape:
                raise ModelError(
                    f"the teacher answers with {reference.shape[1]} classes, the model with {logits.shape[1]}; "
                    f"their answers cannot be compared (--num-classes)"
                )
            same = (ranked[:, 0] == reference.argmax(dim=1).to(device)) & reference.isfinite().all(dim=1).to(device)
        counts.append(
            torch.stack(
                [hits[:, 0].sum(), hits.any(dim=1).sum(), same.sum(), hits.new_tensor(len(hits), dtype=torch.int64)]
            )
        )
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
    sums = torch.zeros(_COUNTS + 1, dtype=torch.float64)
    # One transfer at the end: reading a number per batch would make the device wait each time.
    if counts:
        sums[:_COUNTS] = torch.stack(counts).cpu().double().sum(0)
        sums[_COUNTS] = torch.stack(losses).cpu().double().sum()
    return sums


def summarise(sums: Tensor, compared: bool) -> EvalResult:
    """Percentages and means of the sums of :func:`count`."""
    correct, five, same, samples, loss = sums.tolist()
    if not samples:
        raise DataError("the validation data hold no samples")
    return EvalResult(
        top1=100 * correct / samples,
        top5=100 * five / samples,
        loss=loss / samples,
        samples=int(samples),
        agreement=100 * same / samples if compared else None,
        kept=int(same) if compared else None,
    )
