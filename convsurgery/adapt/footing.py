"""What a measurement stands on: weights, images, the classes that answers and labels have; and what follows from it."""

from __future__ import annotations

from torch import Tensor, nn

from convsurgery.adapt.bounds import clopper_pearson
from convsurgery.errors import warn
from convsurgery.surgery import weights_of

__all__ = ["chance", "no_better", "one_class", "warn_of_random"]

_LOAD = "load trained ones: pretrained=True (--pretrained), or checkpoint=FILE (--checkpoint)"


def warn_of_random(**parts: nn.Module | None) -> None:
    """Warn, once, where the weights of a model are as they were initialised; parts are named by their role."""
    roles = [role for role, part in parts.items() if part is not None and weights_of(part).random]
    if roles:
        warn(
            f"the weights of the {' and the '.join(roles)} are random: what is measured on them says nothing of a "
            f"trained model; {_LOAD}"
        )


def one_class(answers: Tensor, role: str = "model") -> str | None:
    """Why agreement with some answers would say nothing, or None where it says something.

    Args:
        answers: how often each class was answered (C,), of finite scores.
        role: who answers, for the text.
    """
    total = int(answers.sum())
    if not total:
        return f"n/a: the {role} gives no finite scores"
    if int((answers > 0).sum()) > 1:
        return None
    if total == 1:
        return "n/a: one image says nothing about agreement"
    return (
        f"n/a: the {role} answers all {total:,} images with class {int(answers.argmax())}, and to agree with that says "
        f"nothing"
    )


def no_better(correct: int, most: int, total: int) -> bool:
    """Whether right answers do not show to be more than the most frequent class has, by the 95 % interval."""
    return correct <= most or clopper_pearson(correct, total)[0] <= most / total


def chance(correct: int, labels: Tensor, what: str = "the model") -> str | None:
    """A sentence where right answers are no more than always the most frequent class would give; else None.

    Args:
        correct: number of right answers.
        labels: how often each class occurs (C,).
        what: has answered, for the text.
    """
    total, most = int(labels.sum()), int(labels.max()) if labels.numel() else 0
    if not total:
        return None
    if most == total:
        return f"all {total:,} images are of one class: right answers on them say nothing"
    share, usual = 100 * correct / total, 100 * most / total
    always = f"always answering the most frequent class ({usual:.2f} %)"
    if correct <= most:
        return f"{what} is right on {share:.2f} % of {total:,} images, no better than {always}"
    if no_better(correct, most, total):
        return f"{what} is right on {share:.2f} % of {total:,} images, which may be no better than {always}"
    return None
