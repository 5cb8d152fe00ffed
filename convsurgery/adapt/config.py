"""The knobs of fine-tuning: one frozen dataclass gives the Python arguments, their checks and their help texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

from convsurgery.errors import SettingsError, nearest

__all__ = ["SCHEDULERS", "FinetuneConfig", "make_config"]

# timm keeps no list of its schedule names. "plateau" is deprecated there and left out.
SCHEDULERS = ("constant", "cosine", "multistep", "none", "poly", "rsqrt", "step", "tanh", "wsd")


def _knob(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    limits = {"least": least, "above": above, "most": most, "below": below}
    return field(default=default, metadata={"help": help, "limits": limits, "choices": choices})


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of :func:`convsurgery.finetune`, under the names of timm's training script.

    Defaults are timm's except where a converted model wants gentler ones: it starts near its optimum, so the learning
    rate is small (AdamW, 1e-4, warm-up over half an epoch), labels are not smoothed, the schedule moves with every
    update because runs are short, and mixed precision means bfloat16, since powers overflow float16 early.

    Each field carries ``metadata["help"]``. A value out of range raises :class:`SettingsError` and names the range.

    >>> FinetuneConfig(epochs=3, lr=5e-5).sched
    'cosine'
    """

    epochs: int = _knob(10, "passes over the training data", least=1)
    batch_size: int = _knob(128, "images per batch and process, where the loaders are made here", least=1)
    validation_batch_size: int | None = _knob(None, "images per validation batch; batch_size when absent", least=1)
    workers: int = _knob(4, "loader processes for data read from disk", least=0)
    no_aug: bool = _knob(False, "no training augmentation")

    opt: str = _knob("adamw", "optimizer, any name timm knows")
    lr: float = _knob(1e-4, "learning rate at the top of the schedule", above=0)
    weight_decay: float = _knob(0.01, "weight decay; biases and other 1-d parameters are exempt", least=0)
    momentum: float = _knob(0.9, "momentum, for optimizers that have it", least=0, below=1)
    opt_eps: float | None = _knob(None, "epsilon of the optimizer; its own default when absent", above=0)
    opt_betas: tuple[float, ...] | None = _knob(None, "betas of the optimizer; its own when absent", least=0, below=1)
    layer_decay: float | None = _knob(None, "factor on the learning rate per layer towards the input", above=0, most=1)
    clip_grad: float | None = _knob(
        None, "gradient limit (its meaning is clip_mode's); no clipping when absent", above=0
    )
    clip_mode: str = _knob("norm", "what clip_grad limits", choices=("norm", "value", "agc"))
    grad_accum_steps: int = _knob(1, "batches per optimizer step", least=1)

    sched: str = _knob("cosine", "learning rate schedule", choices=SCHEDULERS)
    sched_on_updates: bool = _knob(True, "move the schedule with every update instead of every epoch")
    warmup_epochs: float = _knob(
        0.5, "epochs (fractions allowed) in which the rate rises from warmup_lr to lr", least=0
    )
    warmup_lr: float = _knob(1e-5, "learning rate at the first update, at most lr", least=0)
    min_lr: float = _knob(0.0, "learning rate at the end of schedules that decay to a bound", least=0)
    decay_epochs: float | None = _knob(
        None, "decay interval (step) or length (wsd, rsqrt); timm's when absent", above=0
    )
    decay_milestones: tuple[int, ...] = _knob((90, 180, 270), "epochs at which multistep decays", least=0)
    decay_rate: float = _knob(0.1, "factor of step and multistep, power of poly", above=0)

    smoothing: float = _knob(0.0, "label smoothing", least=0, below=1)
    kd_alpha: float = _knob(0.5, "weight of the teacher in the loss; the labels weigh 1 - kd_alpha", least=0, most=1)
    kd_temperature: float = _knob(4.0, "temperature both softmaxes are taken at for distillation", above=0)

    blend: str = _knob(
        "linear", "how blended layers go from convolution to operator", choices=("linear", "cosine", "none")
    )
    blend_epochs: float | None = _knob(
        None, "epochs (fractions allowed) until they have arrived; half of all when absent", above=0
    )
    blend_order: str = _knob(
        "together", "all at once, or one after the other in execution order", choices=("together", "layers")
    )
    nonlinearity: float | None = _knob(
        None, "eps to which layers that began by neutral are raised; they stay when absent", above=0, most=1
    )
    nonlinearity_epochs: float | None = _knob(
        None, "epochs (fractions allowed) until they have arrived; half of all when absent", above=0
    )

    amp: bool = _knob(False, "mixed precision; without it `accelerate launch --mixed_precision` decides")
    amp_dtype: str = _knob("bfloat16", "type of mixed precision", choices=("bfloat16", "float16"))
    device: str | None = _knob(None, "'cpu' keeps off the GPU; else Accelerate chooses", choices=("cpu",))
    seed: int = _knob(42, "seed of data order, augmentation and dropout", least=0)
    log_interval: int = _knob(50, "steps between two lines of progress; 0 writes one line per epoch", least=0)
    eval_metric: str = _knob("top1", "what makes an epoch the best", choices=("top1", "top5", "loss", "agreement"))
    divergence: float | None = _knob(
        4.0, "stop when the running loss stays this many times above its lowest level; None never stops", above=1
    )
    find_unused_parameters: bool = _knob(False, "many processes only: allow parameters that get no gradient")

    def __post_init__(self) -> None:
        for item in fields(self):
            value, kinds = getattr(self, item.name), str(item.type).split(" | ")
            if value is None and "None" in kinds:
                continue
            object.__setattr__(self, item.name, _checked(item.name, value, kinds[0], item.metadata))
        if self.warmup_epochs >= self.epochs:
            raise SettingsError(
                f"warmup_epochs must be below epochs, or the rate never reaches lr: {self.warmup_epochs:g} of "
                f"{self.epochs} (--warmup-epochs, --epochs)"
            )
        for name in ("blend_epochs", "nonlinearity_epochs"):
            if (getattr(self, name) or 0) > self.epochs:
                flag = "--" + name.replace("_", "-")
                raise SettingsError(
                    f"{name} must be at most epochs, or the layers never arrive: {getattr(self, name):g} of "
                    f"{self.epochs} ({flag}, --epochs)"
                )
        if self.opt_betas is not None and len(self.opt_betas) not in (2, 3):
            raise SettingsError(f"opt_betas takes two numbers, for some optimizers three: not {self.opt_betas}")
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        from timm.optim import list_optimizers

        head, _, tail = self.opt.lower().rpartition("_")
        known = list_optimizers()
        if tail not in known or head not in ("", "lookahead"):
            raise SettingsError(f"opt: timm knows no optimizer {self.opt!r} (--opt); {nearest(self.opt, known)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the training state and for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _checked(name: str, value: Any, kind: str, metadata: Mapping[str, Any]) -> Any:
    """``value`` as the field holds it, or the error that says what is legal."""
    flag = "--" + name.replace("_", "-")
    if kind.startswith("tuple"):
        if not isinstance(value, (tuple, list)):
            raise SettingsError(f"{name} must be a list of numbers, not {value!r} ({flag})")
        inner = kind[len("tuple[") :].split(",")[0]
        return tuple(_checked(name, part, inner, metadata) for part in value)
    number = isinstance(value, Real) and not isinstance(value, bool)
    legal = {
        "bool": (isinstance(value, bool), "True or False"),
        "int": (number and isinstance(value, Integral), "a whole number"),
        "float": (number and math.isfinite(float(value)), "a finite number"),
        "str": (isinstance(value, str), "a word"),
    }[kind]
    if not legal[0]:
        raise SettingsError(f"{name} must be {legal[1]}, not {value!r} ({flag})")
    choices = metadata["choices"]
    if choices and value not in choices:
        raise SettingsError(f"{name} cannot be {value!r} ({flag}); {nearest(value, choices)}")
    if number:
        limits = metadata["limits"]
        inside = (
            (limits["least"] is None or value >= limits["least"])
            and (limits["above"] is None or value > limits["above"])
            and (limits["most"] is None or value <= limits["most"])
            and (limits["below"] is None or value < limits["below"])
        )
        if not inside:
            words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
            legal_range = " and ".join(f"{words[key]} {limit:g}" for key, limit in limits.items() if limit is not None)
            raise SettingsError(f"{name} must be {legal_range}, not {value} ({flag})")
        return int(value) if kind == "int" else float(value)
    return value


def make_config(config: FinetuneConfig | None, settings: Mapping[str, Any]) -> FinetuneConfig:
    """``config`` (or the defaults) with ``settings`` put over it; an unknown name raises with the nearest one."""
    known = [item.name for item in fields(FinetuneConfig)]
    for name in settings:
        if name not in known:
            raise SettingsError(f"finetune has no setting {name!r}; {nearest(name, known)}")
    return replace(config, **settings) if config is not None else FinetuneConfig(**settings)
