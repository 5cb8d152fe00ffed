"""ONNX files, written and compared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convsurgery.adapt.data import DataSplit
from convsurgery.adapt.images import Images, calibration_images
from convsurgery.surgery import unwrap

if TYPE_CHECKING:
    from convsurgery.export import Parity

__all__ = ["export_onnx", "verify_onnx"]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    inline: bool = False,
    opset: int | None = None,
    verify: bool = True,
    data: Any = None,
    images: int = 64,
    seed: int = 0,
    **options: Any,
) -> Parity | None:
    """Write ``model`` as ONNX, verified in ONNX Runtime before the file appears.

    Args:
        model: float32; not changed.
        path: of the file to write; nothing is left there when anything fails.
        inline: standard operators only, instead of one node per operator with its body inside the file.
        opset: of the standard operators, 18 to 23; 18 when not given.
        verify: compare with PyTorch on batches of 1, 2 and 5.
        data: real images to compare on too, as for :func:`calibrate`; batches that are given are taken as they are.
        images, seed: how many of a folder, data set or tensor to draw, evenly over folders or classes, and by what.
        **options: ``example_inputs``, ``dynamic_batch``, ``tolerance``, ``overwrite``; see
            :func:`convsurgery.export.export_onnx`.

    Returns:
        What was measured, or None without ``verify``.

    Raises:
        ExportError: when the model cannot be exported or the file not be written.
        ParityError: when the file computes something else; names the first node that differs.
    """
    from convsurgery.export import export_onnx as write

    batches = _batches(data, model, images, seed)
    parity = write(model, path, inline=inline, opset=opset, verify=verify, data=batches, **options)
    return None if parity is None else _with_data(parity, batches)


def verify_onnx(
    path: str | os.PathLike[str], model: nn.Module, *, data: Any = None, images: int = 64, seed: int = 0, **options: Any
) -> Parity:
    """Compare an ONNX file with the model it was made from, in ONNX Runtime.

    Args:
        path: the file.
        model: the PyTorch model; not changed.
        data, images, seed: as for :func:`export_onnx`.
        **options: ``example_inputs``, ``batches``, ``tolerance``; see :func:`convsurgery.export.verify_onnx`.

    Raises:
        ExportError: when the file cannot be read or run.
        ParityError: when it computes something else; names the first node that differs.
    """
    from convsurgery.export import verify_onnx as check

    batches = _batches(data, model, images, seed)
    return _with_data(check(path, model, data=batches, **options), batches)


def _batches(data: Any, model: nn.Module, images: int, seed: int) -> Any:
    """Batches as they are, or a part of what is no batches yet."""
    pair = isinstance(data, Sequence) and len(data) == 2 and isinstance(data[0], (DataLoader, Dataset))
    if pair or isinstance(data, (str, os.PathLike, Tensor, Dataset, DataSplit)):
        return calibration_images(data, unwrap(model), images=images, seed=seed)
    return data


def _with_data(parity: Parity, batches: Any) -> Parity:
    return dataclasses.replace(parity, data=str(batches)) if isinstance(batches, Images) else parity
