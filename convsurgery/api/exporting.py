"""ONNX files, written and compared."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import nn

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
    **options: Any,
) -> Parity | None:
    """Write ``model`` as ONNX, verified in ONNX Runtime before the file appears.

    Args:
        model: float32; not changed.
        path: of the file to write; nothing is left there when anything fails.
        inline: standard operators only, instead of one node per operator with its body inside the file.
        opset: of the standard operators, 18 to 23; 18 when not given.
        verify: compare with PyTorch on batches of 1, 2 and 5.
        **options: ``example_inputs``, ``dynamic_batch``, ``tolerance``, ``data``; see
            :func:`convsurgery.export.export_onnx`.

    Returns:
        What was measured, or None without ``verify``.

    Raises:
        ExportError: when the model cannot be exported or the file not be written.
        ParityError: when the file computes something else; names the first node that differs.
    """
    from convsurgery.export import export_onnx as write

    return write(model, path, inline=inline, opset=opset, verify=verify, **options)


def verify_onnx(path: str | os.PathLike[str], model: nn.Module, **options: Any) -> Parity:
    """Compare an ONNX file with the model it was made from, in ONNX Runtime.

    Args:
        path: the file.
        model: the PyTorch model; not changed.
        **options: ``example_inputs``, ``batches``, ``tolerance``, ``data``; see :func:`convsurgery.export.verify_onnx`.

    Raises:
        ExportError: when the file cannot be read or run.
        ParityError: when it computes something else; names the first node that differs.
    """
    from convsurgery.export import verify_onnx as check

    return check(path, model, **options)
