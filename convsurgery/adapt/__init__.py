"""After the cut: data, evaluation and fine-tuning of a converted model.

Names are loaded on first use: the command line reads the settings of fine-tuning without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convsurgery.adapt.config import FinetuneConfig
    from convsurgery.adapt.data import DataSplit, InputSpec, input_spec, list_datasets, load_data
    from convsurgery.adapt.evaluation import EvalResult, evaluate
    from convsurgery.adapt.finetuning import finetune
    from convsurgery.adapt.fitting import fit_layers
    from convsurgery.adapt.losses import distillation_loss
    from convsurgery.adapt.results import EpochMetrics, FinetuneResult

_MODULES = {
    "FinetuneConfig": "config",
    **dict.fromkeys(("DataSplit", "InputSpec", "input_spec", "list_datasets", "load_data"), "data"),
    **dict.fromkeys(("EvalResult", "evaluate"), "evaluation"),
    "finetune": "finetuning",
    "fit_layers": "fitting",
    "distillation_loss": "losses",
    **dict.fromkeys(("EpochMetrics", "FinetuneResult"), "results"),
}

__all__ = [
    "DataSplit",
    "EpochMetrics",
    "EvalResult",
    "FinetuneConfig",
    "FinetuneResult",
    "InputSpec",
    "distillation_loss",
    "evaluate",
    "finetune",
    "fit_layers",
    "input_spec",
    "list_datasets",
    "load_data",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
