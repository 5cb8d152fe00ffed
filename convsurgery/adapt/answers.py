"""What a model itself answers, which its replacements are held against."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.adapt.footing import one_class
from convsurgery.adapt.losses import logits_of
from convsurgery.adapt.timing import now
from convsurgery.errors import ModelError

__all__ = ["Answers"]


class Answers:
    """What the model itself answers, batch by batch, and how long it takes for one image.

    Args:
        twin: the model.
        batches: images.
        labels: their class numbers (N,), where they are known.

    Attributes:
        refused: why agreement with these answers would say nothing, or None.
        occurring: how often each class occurs among the labels (C,); empty where they are not known.
        correct: number of right answers.

    Raises:
        ModelError: for scores that are not finite.
    """

    def __init__(self, twin: nn.Module, batches: Sequence[Tensor], labels: Sequence[Tensor | None] = ()) -> None:
        self.logs: list[Tensor] = []
        self.tops: list[Tensor] = []
        taken = []
        for batch in batches:
            given = batch.clone()
            begun = now(given)
            logits = logits_of(twin(given))
            taken.append((now(logits) - begun) / len(batch))
            if not bool(torch.isfinite(logits).all()):
                raise ModelError("the model itself gives scores that are not finite: look at the images and weights")
            self.logs.append(F.log_softmax(logits.double(), dim=1))
            self.tops.append(logits.argmax(dim=1))
        self.milliseconds = 1000 * statistics.median(taken)
        self.images = sum(map(len, batches))
        classes = self.logs[0].shape[1]
        self.refused = one_class(torch.cat(self.tops).bincount(minlength=classes))
        known = [part.to(top.device) for part, top in zip(labels, self.tops, strict=False) if part is not None]
        together = torch.cat(known) if len(known) == len(batches) else torch.zeros(0, dtype=torch.int64)
        # Numbers that the model has no outputs for are no labels of its classes.
        sound = len(together) > 0 and 0 <= int(together.min()) <= int(together.max()) < classes
        self.labels = known if sound else None
        self.occurring = together.long().bincount(minlength=classes) if sound else together[:0]
        self.correct = sum(int((a == b).sum()) for a, b in zip(self.tops, self.labels or (), strict=False))
