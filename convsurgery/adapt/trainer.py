"""The training loop."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from convsurgery.adapt.checkpoints import RunFolder
from convsurgery.adapt.config import FinetuneConfig
from convsurgery.adapt.data import DataSplit
from convsurgery.adapt.evaluation import EvalResult, count, summarise, told_before, unpack
from convsurgery.adapt.guard import LossWatch, Snapshot, advice, first_nonfinite, nonfinite_gradients
from convsurgery.adapt.losses import TaskLoss, check_labels, logits_of
from convsurgery.adapt.optim import carry_over, make_optimizer, make_scheduler
from convsurgery.adapt.progress import Progress
from convsurgery.adapt.results import EpochMetrics
from convsurgery.adapt.resuming import check_resumed, identity
from convsurgery.adapt.running import eval_mode
from convsurgery.adapt.scales import ScaleWatch
from convsurgery.adapt.schedule import StartSchedule
from convsurgery.adapt.sharing import share
from convsurgery.errors import DataError, ModelError, TrainingError
from convsurgery.surgery import blend_modules, finish_blend

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Trainer"]

# A float16 scaler looks for its scale by skipping updates, at most about twenty in a row from 65536 down to nothing.
_SKIPS = 25


class _Scores(nn.Module):
    """The model under a module of its own, which Accelerate may wrap and patch in the user's model's place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


class Trainer:
    """One run of :func:`convsurgery.finetune`, after its arguments were checked."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        teacher: nn.Module | None,
        split: DataSplit,
        config: FinetuneConfig,
        progress: Progress,
    ) -> None:
        self.accelerator, self.model, self.teacher = accelerator, model, teacher
        self.config, self.progress = config, progress
        self.device: torch.device = accelerator.device
        for part in (model, teacher):
            if part is not None:
                part.to(self.device)
        self.classes = self._probe(split)
        self.distilling = teacher is not None and config.kd_alpha > 0
        self.loss = TaskLoss(smoothing=config.smoothing, alpha=config.kd_alpha, temperature=config.kd_temperature)
        self.watch = LossWatch(config.divergence)
        self.starts = StartSchedule(model, config)
        self.scales = ScaleWatch()
        owners = (split.train, getattr(split.train.batch_sampler, "sampler", None))
        found = (getattr(owner, "generator", None) for owner in owners)
        self.generators = [generator for generator in found if isinstance(generator, torch.Generator)]
        # The batches stay on the CPU until their labels were looked at.
        self.train_loader = accelerator.prepare_data_loader(split.train, device_placement=False)
        self.val_loader = None if split.val is None else share(split.val, accelerator, config.seed)
        self.updates_per_epoch = self._updates_per_epoch()
        self.identity = identity(split, teacher, self.updates_per_epoch)
        self.result: EvalResult | None = None
        self._prepare()
        self.snapshot = Snapshot(model)
        self.skipped = 0
        self.history: list[EpochMetrics] = []

    def _prepare(self, before: torch.optim.Optimizer | None = None, update: int = 0) -> None:
        """Optimizer and schedule for the parameters there are; what an optimizer before knew of them is kept."""
        optimizer = make_optimizer(self.model, self.config)
        self.scheduler = make_scheduler(optimizer, self.config, self.updates_per_epoch)
        if before is not None:
            carry_over(before, optimizer)
        if self.scheduler is not None and update:
            self.scheduler.step_update(update)
        self.module, self.optimizer = self.accelerator.prepare(_Scores(self.model), optimizer)

    def _drop_convolutions(self, epoch: int) -> None:
        """Where a blend has arrived its convolution goes, and with it what the optimizer keeps for it."""
        arrived = sum(module.t.item() == 1 for module in blend_modules(self.model).values())
        if not arrived:
            return
        before = self.optimizer.optimizer
        # A wrapper of several processes would go on to wait for gradients of what is gone.
        self.module = self.optimizer = None
        self.accelerator.free_memory()
        finish_blend(self.model)
        self._prepare(before, epoch * self.updates_per_epoch)
        self.starts.follow()
        self.scales.follow(self.model)
        self.progress.note(f"{arrived} blended layers have arrived at their operators; the convolutions are gone")

    def _probe(self, split: DataSplit) -> int:
        """Number of the model's outputs; refuses data or a teacher that do not fit before anything is trained."""
        source = split.val if split.val is not None else split.train
        batch = next(iter(source), None)
        if batch is None:
            raise DataError(f"{split.name} holds no samples")
        images = unpack(batch)[0][:2].to(self.device)
        scores = []
        for role, part in (("model", self.model), ("teacher", self.teacher)):
            if part is not None:
                try:
                    with eval_mode(part), torch.no_grad(), self.accelerator.autocast():
                        scores.append(logits_of(part(images)))
                except RuntimeError as error:
                    raise ModelError(f"the {role} cannot run images of shape {tuple(images.shape)}: {error}") from error
        outputs = int(scores[0].shape[1])
        if scores[-1].shape[1] != outputs:
            raise ModelError(
                f"the teacher answers with {scores[-1].shape[1]} classes, the model with {outputs}; build both with "
                f"the same number of classes (--num-classes)"
            )
        if split.num_classes not in (None, outputs):
            raise DataError(
                f"{split.name} has {split.num_classes} classes, the model has {outputs}; build the model with "
                f"num_classes={split.num_classes} (--num-classes {split.num_classes})"
            )
        return outputs

    def _updates_per_epoch(self) -> int:
        try:
            batches = len(self.train_loader)
        except TypeError:
            if self.config.sched_on_updates and self.config.sched != "none":
                raise TrainingError(
                    "the training loader has no length, so a schedule that moves with every update does not know how "
                    "long an epoch is; set sched_on_updates=False or sched='none'"
                ) from None
            return 0
        if batches == 0:
            raise DataError("the training loader holds no batch: fewer samples than the batch size, with drop_last")
        return math.ceil(batches / int(self.accelerator.gradient_accumulation_steps))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights. No random state: every epoch draws from a seed of its own."""
        scaler = self.accelerator.scaler
        return {
            "epoch": self.history[-1].epoch,
            "config": self.config.to_dict(),
            "distilling": self.distilling,
            "identity": self.identity,
            "history": [vars(row) for row in self.history],
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "eps": dict(self.starts.eps),
            "blends": dict(self.starts.order),
            "left": [module.site for module in blend_modules(self.model).values()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` gave; the weights are in place already."""
        check_resumed(state, self.config, self.distilling, self.identity)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.starts.eps = state.get("eps", {})
        self.starts.order = state.get("blends", {})
        self.history = [EpochMetrics(**row) for row in state["history"]]
        if self.scheduler is not None:
            # Of a run that is made longer the rate is another one from here on.
            self.scheduler.step_update(self.epochs_done * self.updates_per_epoch)
            self.scheduler.step(self.epochs_done)
        self.snapshot = Snapshot(self.model)

    @property
    def epochs_done(self) -> int:
        return self.history[-1].epoch if self.history else 0

    @property
    def best_epoch(self) -> int:
        return max(self.history, key=lambda row: row.rank(self.config.eval_metric)).epoch

    def run(self, folder: RunFolder | None, on_epoch: Callable[[EpochMetrics], object] | None) -> None:
        """Train what is left of the epochs; only the main process is given a folder."""
        self.scales.follow(self.model)
        try:
            self._run(folder, on_epoch)
        finally:
            self.scales.leave()

    def _run(self, folder: RunFolder | None, on_epoch: Callable[[EpochMetrics], object] | None) -> None:
        if not self.history:
            start = time.perf_counter()
            result = self._validate()
            for note in told_before(result, self.config, distilling=self.distilling):
                self.progress.note(note)
            self._record(EpochMetrics.of(0, result, seconds=time.perf_counter() - start), folder, on_epoch)
        for epoch in range(self.epochs_done + 1, self.config.epochs + 1):
            start = time.perf_counter()
            self._seed(epoch)
            train_loss, lr = self._train(epoch)
            self._drop_convolutions(epoch)
            result = self._validate()
            if self.scheduler is not None:
                self.scheduler.step(epoch)
            seconds = time.perf_counter() - start
            row = EpochMetrics.of(epoch, result, train_loss=train_loss, lr=lr, seconds=seconds)
            self.snapshot = Snapshot(self.model)
            self._record(row, folder, on_epoch)

    def _seed(self, epoch: int) -> None:
        """A resumed run draws in this epoch what an uninterrupted one draws; every process draws differently."""
        seed = random.Random(f"{self.config.seed} {epoch} {self.accelerator.process_index}").getrandbits(32)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        # The order must be the same in every process, which then takes its share of it.
        self.train_loader.set_epoch(epoch)
        for generator in self.generators:
            generator.manual_seed(self.config.seed + epoch)

    def _record(
        self, row: EpochMetrics, folder: RunFolder | None, on_epoch: Callable[[EpochMetrics], object] | None
    ) -> None:
        self.history.append(row)
        if folder is not None:
            if row.epoch == self.best_epoch:
                folder.write_best(self.model)
            folder.write_last(self.model, self.state())
            folder.append(vars(row))
        if row.epoch or row.val_loss is not None:
            self.progress.note(row.line(self.config.epochs))
        self.accelerator.wait_for_everyone()
        if on_epoch is not None:
            on_epoch(row)

    def _validate(self) -> EvalResult | None:
        if self.val_loader is None:
            return None
        if self.accelerator.num_processes > 1:
            from timm.utils import distribute_bn

            # Each process has seen other images; what is measured must be what is saved.
            distribute_bn(self.model, self.accelerator.num_processes, reduce=True)
        with eval_mode(self.model, self.teacher):
            sums = count(
                self.model,
                self.val_loader,
                teacher=self.teacher,
                device=self.device,
                autocast=self.accelerator.autocast,
                classes=self.classes,
            )
        if self.accelerator.num_processes > 1:
            # float32, as not every device has float64; counts below 2**24 stay exact.
            sums = self.accelerator.reduce(sums.float().to(self.device), "sum").cpu().double()
        self.result = summarise(sums, self.teacher is not None)
        return self.result

    def _train(self, epoch: int) -> tuple[float, float]:
        """Mean loss over the samples of the epoch, and the learning rate of the last update."""
        accelerator = self.accelerator
        self.module.train()
        if self.teacher is not None:
            self.teacher.eval()
        batches = len(self.train_loader) if self.updates_per_epoch else None
        self.progress.begin_epoch(epoch, self.config.epochs, batches)
        update = (epoch - 1) * self.updates_per_epoch
        total, samples, lr = 0.0, 0, 0.0
        self.optimizer.zero_grad()
        for step, batch in enumerate(self.train_loader, 1):
            images, targets = unpack(batch)
            check_labels(targets, self.classes)
            inputs, labels = (part.to(self.device, non_blocking=True) for part in (images, targets))
            if self.starts.active:
                self.starts.at(epoch - 1 + step / len(self.train_loader) if self.updates_per_epoch else epoch)
            self.scales.arm(step)
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            with accelerator.accumulate(self.module):
                reference = self._reference(inputs)
                logits = self.module(inputs)
                loss = self.loss(logits, labels, reference)
                if self.watch.guess == math.inf:
                    with torch.no_grad():
                        self.watch.guess = self._mean(self.loss(torch.zeros_like(logits), labels, reference)).item()
                accelerator.backward(loss)
                value = self._check(loss, inputs, epoch, step)
                if accelerator.sync_gradients:
                    self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                update += 1
                self._count_skips(epoch, step)
                if self.scheduler is not None:
                    self.scheduler.step_update(update)
            total, samples = total + value * len(targets), samples + len(targets)
            self.progress.step(step, value, lr)
            for text in self.scales.grown():
                self.progress.note(f"epoch {epoch}, step {step}: {text}")
        if not samples:
            raise DataError("the training loader gave no batch")
        return total / samples, lr

    def _reference(self, inputs: Tensor) -> Tensor | None:
        if not self.distilling or self.teacher is None:
            return None
        with torch.no_grad(), self.accelerator.autocast():
            return logits_of(self.teacher(inputs))

    def _check(self, loss: Tensor, inputs: Tensor, epoch: int, step: int) -> float:
        """The loss, averaged over the processes, after making sure that the update to come is a sane one."""
        numbers = [self._mean(loss)]
        # A float16 scaler meets infinite gradients on purpose and skips them itself.
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            gradients = [tensor.grad for tensor in self.model.parameters() if tensor.grad is not None]
            numbers.append(torch.nn.utils.get_total_norm(gradients).float().to(self.device))
        # One transfer for both, as each makes the host wait for the device.
        value, *norm = torch.stack(numbers).tolist()
        diverged = self.watch.diverged(value)
        if not math.isfinite(value):
            self._stop(f"the loss is {value}", epoch, step, inputs)
        if norm and not math.isfinite(norm[0]):
            self._stop("the gradients are not finite", epoch, step, inputs)
        if diverged:
            self._stop("the loss diverges", epoch, step, None)
        return float(value)

    def _mean(self, loss: Tensor) -> Tensor:
        """Over the processes, so that all of them judge alike."""
        mean: Tensor = self.accelerator.reduce(loss.detach().float(), "mean")
        return mean

    def _clip(self) -> None:
        if self.config.clip_grad is None:
            return
        from timm.models import model_parameters
        from timm.utils import dispatch_clip_grad

        self.accelerator.unscale_gradients()
        # As in timm: adaptive clipping leaves the head alone.
        parameters = model_parameters(self.model, exclude_head=self.config.clip_mode == "agc")
        dispatch_clip_grad(parameters, self.config.clip_grad, mode=self.config.clip_mode)

    def _count_skips(self, epoch: int, step: int) -> None:
        self.skipped = self.skipped + 1 if self.accelerator.optimizer_step_was_skipped else 0
        if self.skipped >= _SKIPS:
            self._stop(f"{_SKIPS} float16 updates in a row had gradients that are not finite", epoch, step, None)

    def _stop(self, what: str, epoch: int, step: int, inputs: Tensor | None) -> NoReturn:
        """Raise, with the model back at its last good epoch."""
        lines = [f"training stopped at epoch {epoch}, step {step}: {what}", self.watch.describe()]
        if inputs is not None:
            lines += self._culprit(inputs)
        lines += self.scales.worst()
        self.snapshot.restore()
        for module in blend_modules(self.model).values():
            module.set_t(module.t.item())
        self.optimizer.zero_grad()
        lines += [advice(self.config, updated=(epoch, step) != (1, 1))]
        lines += [
            f"the model is back at {f'the end of epoch {epoch - 1}' if epoch > 1 else 'its state before training'}"
        ]
        raise TrainingError("\n".join(lines))

    def _culprit(self, inputs: Tensor) -> list[str]:
        """Where the values stop being finite, in whichever process met them."""
        found = first_nonfinite(self.model, inputs, self.accelerator.autocast)
        if found is None and self.teacher is not None:
            found = first_nonfinite(self.teacher, inputs, self.accelerator.autocast)
            found = None if found is None else f"in the teacher, {found}"
        # Gradients are shared by all processes; only the forward pass knows which of them met the values first.
        places = [found, nonfinite_gradients(self.model)]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            places = [*gather_object(places[:1]), *places[1:]]
        return [place for place in places if place][:1]
