"""What is minimised: cross-entropy with the labels, and distillation from a teacher's logits."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.errors import DataError, ModelError

__all__ = ["TaskLoss", "check_labels", "distillation_loss", "logits_of"]


def logits_of(output: Any) -> Tensor:
    """The class scores ``(N, C)`` in a classifier's output.

    Some models answer with more than scores while they train (torchvision's Inception and GoogLeNet, timm's distilled
    transformers); their first tensor is the main head.

    Raises:
        ModelError: the output holds no ``(N, C)`` tensor.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"a classifier must answer with a tensor (batch, classes); this model gave {found}")
    return output


def check_labels(targets: Tensor, classes: int) -> None:
    """Refuse labels that ``classes`` outputs cannot express, before a GPU kernel would abort on them.

    Args:
        targets: class numbers ``(N,)``; give them on the CPU, where looking at them costs nothing.
        classes: number of outputs of the model.
    """
    if targets.ndim != 1 or targets.is_floating_point():
        raise DataError(
            f"labels must be class numbers of shape (batch,), not {targets.dtype} of shape {tuple(targets.shape)}"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise DataError(
            f"a label is {wrong}, but the model has {classes} classes (0 to {classes - 1}); "
            f"build the model with the number of classes of the data (--num-classes)"
        )


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Mean Kullback-Leibler divergence of the student from the teacher, in nats times temperature squared.

    The square keeps the gradient of the same size at every temperature (Hinton, Vinyals, Dean 2015,
    arXiv:1503.02531, section 2).

    Args:
        student: logits ``(N, C)``.
        teacher: logits ``(N, C)``, taken as constant.
        temperature: divides both logits.

    >>> import torch
    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> float(distillation_loss(logits, logits))
    0.0
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"the teacher answers with {teacher.shape[-1]} classes, the model with {student.shape[-1]}; "
            f"build both with the same number of classes (--num-classes)"
        )
    wanted = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    given = F.log_softmax(student.float() / temperature, dim=1)
    return F.kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2


class TaskLoss(nn.Module):
    """``(1 - alpha) * cross-entropy + alpha * distillation``; cross-entropy alone when there is no teacher.

    Args:
        smoothing: label smoothing of the cross-entropy, 0 to below 1.
        alpha: weight of the teacher, 0 to 1.
        temperature: of the distillation.
    """

    def __init__(self, *, smoothing: float = 0.0, alpha: float = 0.5, temperature: float = 4.0) -> None:
        super().__init__()
        from timm.loss import LabelSmoothingCrossEntropy

        self.alpha, self.temperature = alpha, temperature
        self.task: nn.Module = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()

    def forward(self, logits: Tensor, targets: Tensor, teacher: Tensor | None = None) -> Tensor:
        task: Tensor = self.task(logits.float(), targets)
        if teacher is None:
            return task
        distilled = distillation_loss(logits, teacher, self.temperature)
        return (1 - self.alpha) * task + self.alpha * distilled
