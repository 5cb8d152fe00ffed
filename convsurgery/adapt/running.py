"""How a model is run to be looked at: on its own device, in eval mode, and as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from convsurgery.errors import ModelError

__all__ = ["device_of", "eval_mode"]


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
