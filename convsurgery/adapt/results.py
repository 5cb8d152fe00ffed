"""What fine-tuning gives back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from convsurgery.adapt.config import FinetuneConfig
from convsurgery.adapt.evaluation import EvalResult

__all__ = ["EpochMetrics", "FinetuneResult"]


@dataclass(frozen=True)
class EpochMetrics:
    """One row of ``metrics.csv``; a value that was not measured is None, and an empty cell there.

    Attributes:
        epoch: counted from 1; 0 is the model before training.
        train_loss: mean over the epoch's samples, of the loss that was minimised.
        val_loss: mean cross-entropy of the validation samples, in nats.
        val_top1: percent.
        val_top5: percent.
        agreement: validation samples answered as the teacher answers them, in percent.
        kept: the same as a count.
        lr: learning rate of the epoch's last update, the largest of the parameter groups.
        seconds: of training and validation together.
    """

    epoch: int
    train_loss: float | None = None
    val_loss: float | None = None
    val_top1: float | None = None
    val_top5: float | None = None
    agreement: float | None = None
    kept: int | None = None
    lr: float | None = None
    seconds: float = 0.0

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        return tuple(item.name for item in fields(cls))

    @classmethod
    def of(
        cls,
        epoch: int,
        result: EvalResult | None,
        *,
        train_loss: float | None = None,
        lr: float | None = None,
        seconds: float,
    ) -> EpochMetrics:
        if result is None:
            return cls(epoch, train_loss, lr=lr, seconds=seconds)
        return cls(epoch, train_loss, result.loss, result.top1, result.top5, result.agreement, result.kept, lr, seconds)

    def score(self, metric: str) -> tuple[float, float]:
        """Larger is better; equal values are told apart by the loss. Without validation the training loss decides."""
        loss = self.val_loss if self.val_loss is not None else self.train_loss
        chosen = {"top1": self.val_top1, "top5": self.val_top5, "agreement": self.agreement}.get(metric)
        # NaN is better than nothing nowhere.
        tie = -loss if loss is not None and loss == loss else -float("inf")
        return (tie if chosen is None else chosen, tie)

    def rank(self, metric: str) -> tuple[float, bool, float, int]:
        """Larger is better; of equals a trained epoch, then the one with the lower loss, then the later one."""
        chosen, tie = self.score(metric)
        return (chosen, self.epoch > 0, tie, self.epoch)

    def line(self, epochs: int) -> str:
        """For a plain line of progress."""
        parts = [f"epoch {self.epoch}/{epochs}" if self.epoch else "before training"]
        if self.train_loss is not None:
            parts.append(f"train loss {self.train_loss:.4f}")
        if self.val_loss is not None:
            parts.append(f"val loss {self.val_loss:.4f}  top1 {self.val_top1:.2f}  top5 {self.val_top5:.2f}")
        if self.agreement is not None:
            parts.append(f"agreement {self.agreement:.2f}")
        if self.lr is not None:
            parts.append(f"lr {self.lr:.2e}")
        return "  ".join([*parts, f"{self.seconds:.1f} s"])


@dataclass(frozen=True)
class FinetuneResult:
    """What :func:`convsurgery.finetune` did.

    Attributes:
        history: the epochs in order; the first entry is epoch 0, the model before training.
        best_epoch: the one with the best ``eval_metric``; of equals a trained one; 0 when training only made it worse.
        config: all settings of the run.
        output: the run's folder, or None when nothing was written.
        files: what lies in it.
        resumed_from: epochs that were already done when the run began; None for a fresh run.
        weights: where the model's weights came from, as far as it is known.
        notes: what else there is to say: answers no better than chance in the end, a teacher that teaches nothing.
    """

    history: tuple[EpochMetrics, ...]
    best_epoch: int
    config: FinetuneConfig
    output: Path | None = None
    files: tuple[Path, ...] = ()
    resumed_from: int | None = None
    weights: str = ""
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> EpochMetrics:
        return next(row for row in self.history if row.epoch == self.best_epoch)

    @property
    def last(self) -> EpochMetrics:
        return self.history[-1]

    @property
    def initial(self) -> EpochMetrics:
        """The model before training."""
        return self.history[0]
