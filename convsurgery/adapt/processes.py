"""How many processes work together, and on what."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from convsurgery.adapt.config import FinetuneConfig
from convsurgery.errors import SettingsError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["alone_among_processes", "make_accelerator", "started_processes"]

#: where launchers say how many processes they have started: torchrun and accelerate, and three kinds of MPI
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def started_processes() -> int:
    """How many processes a launcher has started, this one included; 1 without a launcher."""
    found = (os.environ.get(name, "") for name in _SIZES)
    return next((int(text) for text in found if text.isdigit() and int(text) > 0), 1)


def alone_among_processes(command: str) -> None:
    """Refuse to do in several processes what is done in one: each would write the same files.

    Raises:
        SettingsError: where a launcher has started more.
    """
    processes = started_processes()
    if processes > 1:
        raise SettingsError(
            f"{processes} processes were started, and {command} is done by one: run it without torchrun or `accelerate "
            "launch`, whose processes finetune alone shares its work among; or unset WORLD_SIZE"
        )


def _shared_device() -> bool:
    """Whether there are devices that several processes can share their work on; Apple's are none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is not None and device.type != "mps"


def make_accelerator(config: FinetuneConfig) -> Accelerator:
    """The processes that were started for a run, on their devices.

    Without a GPU, which `torchrun` does not ask for, several processes share their work on the CPU, by gloo.

    Raises:
        SettingsError: for settings that Accelerate or the device does not take.
        TrainingError: where the processes do not find each other, and each would train a model of its own.
    """
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import DistributedDataParallelKwargs

    processes = started_processes()
    on_cpu = config.device == "cpu" or (processes > 1 and not _shared_device())
    try:
        accelerator = Accelerator(
            # None leaves it to `accelerate launch`.
            mixed_precision={"bfloat16": "bf16", "float16": "fp16"}[config.amp_dtype] if config.amp else None,
            cpu=on_cpu,
            gradient_accumulation_steps=config.grad_accum_steps,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters)],
        )
    except ValueError as error:
        raise SettingsError(f"Accelerate cannot start with these settings: {error} (--amp, --amp-dtype)") from error
    if accelerator.num_processes != processes:
        raise TrainingError(
            f"{processes} processes were started, and Accelerate sees {accelerator.num_processes}: each would train a "
            "model of its own. Start them by torchrun or `accelerate launch`, which set RANK, LOCAL_RANK, WORLD_SIZE "
            "and MASTER_ADDR; or unset WORLD_SIZE for one process"
        )
    # Accelerate would quietly train in float32.
    if config.amp and config.amp_dtype == "float16" and accelerator.device.type == "cpu":
        raise SettingsError("mixed precision with float16 needs a GPU; use amp_dtype='bfloat16' (--amp-dtype bfloat16)")
    return accelerator
