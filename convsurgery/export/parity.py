"""Does the ONNX file compute what the PyTorch model computes? If not, where does it begin to differ?"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from convsurgery import zoo
from convsurgery.errors import ExportError, ParityError, StorageError
from convsurgery.files import input_path
from convsurgery.graph import copy_model
from convsurgery.plain import parse_json
from convsurgery.surgery import fuse, unwrap

__all__ = ["BATCHES", "NODES", "TOLERANCE", "Parity", "check_parity", "verify_onnx"]

#: how long ONNX Runtime may take for one batch of a file that may be a stranger's
_SECONDS = 600.0

BATCHES = (1, 2, 5)
TOLERANCE = 1e-4
#: images of a batch that a file may ask for
_LARGEST_BATCH = 1024
#: metadata key: value name in the graph → module of the PyTorch model, for every operator of ours
NODES = "convsurgery.nodes"


@dataclass(frozen=True)
class Parity:
    """What a comparison measured.

    Attributes:
        batches: batch sizes compared.
        error: largest difference over all outputs, relative to PyTorch's largest output.
        median_error, p99_error: of the differences of single values, relative to the same.
        agreement: share of images with the same top-1 class; None when the output is no table of logits.
        images: how many images were compared.
        data: which real images were among them, such as "64 of 1,347 images, seed 0"; "" for none, or as they came.
    """

    batches: tuple[int, ...]
    error: float
    median_error: float
    p99_error: float
    agreement: float | None
    images: int
    data: str = ""

    def __str__(self) -> str:
        top = "" if self.agreement is None else f", same top-1 on {self.agreement:.2%}"
        return (
            f"{self.images} images in batches of {', '.join(map(str, self.batches))}: error relative to the largest "
            f"output {self.error:.1e} at most, {self.p99_error:.1e} for 99 %, {self.median_error:.1e} the median{top}"
            + f"; among them {self.data}"
            * bool(self.data)
        )


def verify_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    batches: Sequence[int] = BATCHES,
    tolerance: float = TOLERANCE,
    data: Iterable[Any] | None = None,
) -> Parity:
    """Compare an ONNX file with the model it was made from, in ONNX Runtime on the CPU.

    Args:
        path: the file.
        model: the PyTorch model; run in eval mode, not changed.
        example_inputs: what the forward takes; random images of the model's input size when not given.
        batches: batch sizes to try, as far as the file allows them.
        tolerance: largest difference allowed, relative to PyTorch's largest output.
        data: further batches, tensors or ``(images, targets)`` pairs.

    Raises:
        ExportError: when the file cannot be read or run.
        ParityError: when it computes something else; names the first node that differs.
    """
    inputs = example_inputs
    if inputs is None:
        inputs = torch.rand(2, *zoo.input_size(unwrap(model)), generator=torch.Generator().manual_seed(0))
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    return check_parity(input_path(path, ExportError), unwrap(model), given, tuple(batches), tolerance, data)


def check_parity(
    path: Path,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    batches: tuple[int, ...],
    tolerance: float,
    data: Iterable[Any] | None = None,
) -> Parity:
    """As :func:`verify_onnx`, everything given."""
    _check_file(path)
    session = _session(path)
    if not session.get_inputs() or not session.get_outputs():
        raise ExportError(f"{path.name} has no inputs or no outputs: it was not made from a model")
    fixed = session.get_inputs()[0].shape[0]
    if isinstance(fixed, int):
        if not 1 <= fixed <= _LARGEST_BATCH:
            raise ExportError(f"{path.name} wants batches of {fixed}: at most {_LARGEST_BATCH} are compared")
        batches = (fixed,)
    reference = copy_model(model).cpu().eval()
    tries = [_random_like(inputs, batch) for batch in batches]
    given = (_images(batch) for batch in data or ())
    # A file of a fixed batch size takes whole batches only; what is left over is not compared.
    tries += [(part,) for images in given for part in (_parts(images, fixed) if isinstance(fixed, int) else (images,))]
    errors, scale, same, images = [], 0.0, [], 0
    for arrays in tries:
        wanted = _torch_outputs(reference, arrays)
        got = _run(session, arrays, path)
        if [w.shape for w in wanted] != [g.shape for g in got]:
            shapes = f"{[g.shape for g in got]}, PyTorch's {[w.shape for w in wanted]}"
            raise ParityError(f"{path.name}: the outputs have shapes {shapes}")
        for w, g in zip(wanted, got, strict=True):
            errors.append(np.abs(g.astype(np.float64) - w).ravel())
            scale = max(scale, float(np.abs(w).max(initial=0.0)))
        images += len(arrays[0])
        if len(wanted) == 1 and wanted[0].ndim == 2:
            same.append(wanted[0].argmax(1) == got[0].argmax(1))
    relative = np.concatenate(errors) / (scale or 1.0)
    parity = Parity(
        batches,
        float(relative.max(initial=0.0)),
        float(np.median(relative)),
        float(np.quantile(relative, 0.99)),
        float(np.concatenate(same).mean()) if same else None,
        images,
    )
    # Written so that NaN fails.
    if not parity.error <= tolerance:
        where = _first_difference(path, reference, tries[0], tolerance)
        raise ParityError(
            f"{path.name} does not compute what the model computes: {parity}; allowed {tolerance:.1e}. {where}"
        )
    return parity


def _check_file(path: Path) -> None:
    """Refuse a file that reads other files: the weights of what we write are in it.

    Raises:
        ExportError: for what is no ONNX file, and for weights outside of it.
    """
    try:
        if not path.is_file():
            raise ExportError(f"there is no file {path}")
        proto = onnx.load(str(path), load_external_data=False)
    except ExportError:
        raise
    except Exception as error:  # the parser of a damaged file raises almost anything
        raise ExportError(f"ONNX Runtime cannot load {path.name}: it is not an ONNX file: {error!s:.200}") from error
    outside = _outside(proto)
    if outside is not None:
        raise ExportError(
            f"{path.name} keeps weights in another file ({outside!r:.80}), and no file is opened because a file says "
            "so. Put them inside: onnx.save(onnx.load(FILE), FILE, save_as_external_data=False)"
        )


def _outside(message: Any) -> str | None:
    """The first other file that a tensor anywhere in a message, functions and subgraphs included, has its values in."""
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            return next((entry.value for entry in message.external_data if entry.key == "location"), "")
        return None
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        # Maps have keys of their own; ONNX has none of messages.
        for item in value if not hasattr(value, "ListFields") else (value,):
            found = _outside(item) if hasattr(item, "ListFields") else None
            if found is not None:
                return found
    return None


def _session(source: Path | bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        name = "the graph" if isinstance(source, bytes) else source.name
        raise ExportError(f"ONNX Runtime cannot load {name}: {error}") from error


def _random_like(inputs: tuple[Tensor, ...], batch: int) -> tuple[np.ndarray[Any, Any], ...]:
    """The example first, then random values of its range, ``batch`` in all."""
    generator = torch.Generator().manual_seed(batch)
    made = []
    for x in inputs:
        drawn = torch.rand((batch, *x.shape[1:]), generator=generator) * (x.max() - x.min()) + x.min()
        keep = min(batch, x.shape[0]) - 1 if batch > 1 else 0
        drawn[:keep] = x[:keep]
        made.append(drawn.to(x.dtype).numpy())
    return tuple(made)


def _images(batch: Any) -> np.ndarray[Any, Any]:
    images = batch if isinstance(batch, Tensor) else batch[0]
    array: np.ndarray[Any, Any] = images.detach().cpu().float().numpy()
    return array


def _parts(images: np.ndarray[Any, Any], size: int) -> Iterator[np.ndarray[Any, Any]]:
    for first in range(0, len(images) - size + 1, size):
        yield images[first : first + size]


def _torch_outputs(model: nn.Module, arrays: tuple[np.ndarray[Any, Any], ...]) -> list[np.ndarray[Any, Any]]:
    with torch.no_grad():
        out = model(*(torch.from_numpy(array) for array in arrays))
    return [leaf.numpy() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _run(session: Any, arrays: tuple[np.ndarray[Any, Any], ...], path: Path) -> list[np.ndarray[Any, Any]]:
    try:
        feeds = {item.name: array for item, array in zip(session.get_inputs(), arrays, strict=True)}
        outputs: list[np.ndarray[Any, Any]] = _within(_SECONDS, session, feeds)
    except TimeoutError:
        raise ExportError(
            f"ONNX Runtime is not done with {path.name} on shapes {[a.shape for a in arrays]} after {_SECONDS:g} s: a "
            "Loop in it may have no end"
        ) from None
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot run {path.name} on shapes {[a.shape for a in arrays]}: {error}"
        ) from error
    return outputs


def _within(seconds: float, session: Any, feeds: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """Run a session beside this thread, which stays able to hear Ctrl-C; stopped where it takes too long."""
    import onnxruntime

    options, result = onnxruntime.RunOptions(), Future[Any]()

    def work() -> None:
        try:
            result.set_result(session.run(None, feeds, options))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True, name="convsurgery-onnxruntime").start()
    try:
        return list(result.result(seconds))
    except FutureTimeout:
        raise TimeoutError from None
    finally:
        options.terminate = True  # the runtime looks at it between nodes, also in a loop


def _nodes(proto: onnx.ModelProto, path: Path) -> dict[str, str]:
    """Value names of our operators and their modules, as the metadata say; only values that the graph has."""
    text = {prop.key: prop.value for prop in proto.metadata_props}.get(NODES, "{}")
    try:
        held = parse_json(text, f"{path.name}, metadata {NODES}")
    except StorageError as error:
        raise ExportError(str(error)) from error
    if not isinstance(held, dict) or not all(isinstance(module, str) for module in held.values()):
        raise ExportError(f"{path.name}, metadata {NODES}: not what convsurgery writes")
    made = {name for node in proto.graph.node for name in node.output}
    if strange := sorted(set(held) - made):
        raise ExportError(f"{path.name}, metadata {NODES}: the graph has no value {strange[0]!r:.80}")
    return held


def _first_difference(path: Path, model: nn.Module, arrays: tuple[np.ndarray[Any, Any], ...], tolerance: float) -> str:
    """A sentence on where file and model part: every operator of ours is compared, in order."""
    proto = onnx.load(str(path), load_external_data=False)
    nodes = _nodes(proto, path)
    if not nodes:
        return "The file names no operators of convsurgery to compare."
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes if name not in known)
    session = _session(proto.SerializeToString())
    outputs = dict(zip([o.name for o in session.get_outputs()], _run(session, arrays, path), strict=True))
    # The file was written from the fused model, where the batch norms are part of the operators.
    seen: dict[str, list[Tensor]] = {}
    fused = fuse(model)
    modules = dict(fused.named_modules(remove_duplicate=False))

    def keep(name: str, out: Tensor) -> None:
        seen.setdefault(name, []).append(out.clone())  # the activation behind may work in place

    for module in set(nodes.values()) & set(modules):
        modules[module].register_forward_hook(lambda _, args, out, module=module: keep(module, out))
    folded, plain = _torch_outputs(fused, arrays), _torch_outputs(model, arrays)
    last = ""
    for value, module in nodes.items():
        if not seen.get(module):
            return f"The first node that differs: {value}: the model has no module {module!r} that is called so often."
        wanted = seen[module].pop(0).numpy()  # called again, it is the next node of its name
        if outputs[value].shape != wanted.shape:
            return f"The first node that differs: {module or value}: shape {outputs[value].shape}, not {wanted.shape}."
        error = float(np.abs(outputs[value] - wanted).max() / (np.abs(wanted).max() or 1.0))
        if not error <= tolerance:
            return f"The first node that differs: {module or value} ({type(modules[module]).__name__}), by {error:.1e}."
        last = module or value
    change = max(float(np.abs(a - b).max() / (np.abs(b).max() or 1.0)) for a, b in zip(folded, plain, strict=True))
    if not change <= tolerance:
        return f"All operators agree with the fused model, but fusing itself changed its output by {change:.1e}."
    return f"All operators agree; the difference arises behind the last of them, {last}."
