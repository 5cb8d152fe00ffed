"""Weights from a file into a model: everything is checked before the first value is copied."""

from __future__ import annotations

import argparse
import copy
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.errors import ModelError
from convsurgery.files import input_path
from convsurgery.plain import declared
from convsurgery.zoo.origin import Origin, note_origin

__all__ = ["copy_weights", "load_checkpoint", "read_weights"]

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
# In timm's order: a training checkpoint's averaged weights are the ones that were measured.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
# torchvision's densenet files predate the ban on dots in module names; its builders rename the same way.
_DENSE = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))$"
)


def load_checkpoint(model: nn.Module, path: str | Path, *, new_head: bool = False) -> None:
    """Copy the weights of a file into a model, all of them or none.

    Reads ``.safetensors``, and what ``torch.save`` wrote (``.pth .pt .bin .tar .ckpt``) with ``weights_only=True``, so
    that nothing in the file is executed. Training checkpoints are unwrapped ("state_dict", "model", averaged weights
    first), prefixes of DataParallel and ``torch.compile`` removed, and files in an architecture's original layout
    converted where timm knows how.

    Args:
        new_head: leave a classifier of another number of classes as it is in the model instead of refusing the file.

    Raises:
        ModelError: no such file, not readable, holds more than tensors, a value is not finite, keys are missing or
            unexpected, or shapes differ; the text names the keys.

    Example::

        model = create_model("resnet18")
        load_checkpoint(model, "resnet18-f37072fd.pth")
    """
    own_head = copy_weights(model, read_weights(path), str(path), new_head=new_head)
    note_origin(model, Origin(f"checkpoint {Path(path).name}", new_head=own_head))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file under their plain names; raises as :func:`load_checkpoint`."""
    path = input_path(path, ModelError)
    if not path.exists():
        raise ModelError(f"no checkpoint at {path}")
    if not path.is_file():
        raise ModelError(f"{path} is not a file")
    suffix = path.suffix.lower()
    if suffix != ".safetensors" and suffix not in _TORCH_SUFFIXES:
        known = ", ".join((".safetensors", *_TORCH_SUFFIXES))
        raise ModelError(f"{path}: a checkpoint's name ends in one of {known}")
    held = _read_safetensors(path) if suffix == ".safetensors" else _read_torch(path)
    return _unwrap(held, path)


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except Exception as error:  # a damaged header surfaces as whatever the parser stumbled on
        raise ModelError(f"{path} cannot be read as safetensors: {_first_line(error)}") from error


def _read_torch(path: Path) -> Any:
    try:
        # timm's and torchvision's training scripts store their arguments beside the weights; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler of a damaged file raises almost anything
        refused = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise ModelError(
                f"{path} holds more than tensors ({refused[1]}), and reading that would run code from the file; it is "
                "only read with weights_only=True. Save the state_dict() of the model alone, best as .safetensors"
            ) from error
        raise ModelError(
            f"{path} cannot be read as a PyTorch checkpoint, it is damaged or of another kind: {_first_line(error)}"
        ) from error


def _unwrap(held: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(held, Mapping):
        inner = next((held[key] for key in _WRAPPERS if isinstance(held.get(key), Mapping)), held)
    else:
        raise ModelError(f"{path} holds a {type(held).__name__}, not a state dict")
    odd = next(((key, value) for key, value in inner.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ModelError(f"{path} holds no state dict: {odd[0]!r} is a {type(odd[1]).__name__}, not a tensor")
    if not inner:
        raise ModelError(f"{path} holds no weights")
    # Kept as the mapping it is where nothing is renamed: modules read the layout versions it carries.
    state: dict[str, Tensor] = inner if isinstance(inner, dict) else dict(inner)
    for _ in range(2):
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def copy_weights(model: nn.Module, state: dict[str, Tensor], source: str, *, new_head: bool = False) -> bool:
    """Check ``state``, called ``source`` in errors, then copy it; raises as :func:`load_checkpoint`.

    Returns:
        Whether the model's own classifier was left as it is.
    """
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        raise ModelError(f"{source} cannot be loaded into a model on the meta device, it has no memory for weights")
    for key, value in state.items():
        if not _finite(value):
            raise ModelError(f"{source}: {key} holds values that are not finite (NaN or infinity)")
    skeleton = _skeleton(model)
    for convert in _layouts(model):
        try:
            theirs = convert(state)
        except Exception:  # a converter of another layout may trip over anything
            continue
        candidate = _with_own_head(model, theirs) if new_head else theirs
        if _fits(skeleton, candidate):
            model.load_state_dict(candidate)
            return any(value is not theirs.get(key) for key, value in candidate.items())
    raise ModelError(f"{source} does not fit the model ({type(model).__name__})\n{_mismatch(model, state)}")


def _layouts(model: nn.Module) -> Iterable[Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    yield lambda state: state
    yield lambda state: {_DENSE.sub(r"\1\2", key): value for key, value in state.items()}
    convert = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if callable(convert):
        yield lambda state: convert(dict(state), model)


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model without memory, on which a load can be tried with all the hooks modules have for it."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _fits(skeleton: nn.Module, state: dict[str, Tensor]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "copying to a meta parameter is a no-op": that is the point
        try:
            skeleton.load_state_dict(state)
        except RuntimeError:
            return False
    return True


def _finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return True
    # The 8-bit floats have no isfinite of their own.
    return bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all())


def _differing(model: nn.Module, state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Keys of both sides with another shape: (shape in the file, shape in the model)."""
    own = model.state_dict()
    return {
        key: (tuple(value.shape), tuple(own[key].shape))
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    }


def _only_head(model: nn.Module, differing: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether nothing but the number of classes differs: the first dimension alone, everywhere by the same ratio."""
    if not differing:
        return False
    ratios = set()
    for theirs, ours in differing.values():
        if not theirs or not ours or theirs[1:] != ours[1:]:
            return False
        ratios.add(theirs[0] / max(ours[0], 1))
    return len(ratios) == 1


def _with_own_head(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    differing = _differing(model, state)
    own = model.state_dict()
    heads = declared(model).get("classifier") or ()
    # A timm model without classes has no classifier at all, and the file's goes unused.
    unused = {
        f"{head}.{part}" for head in ([heads] if isinstance(heads, str) else heads) for part in ("weight", "bias")
    }
    state = {key: value for key, value in state.items() if key in own or key not in unused}
    if _only_head(model, differing):
        state.update({key: own[key] for key in differing})
    return state


def _mismatch(model: nn.Module, state: dict[str, Tensor]) -> str:
    own = model.state_dict()
    differing = _differing(model, state)
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    lines = []
    if missing:
        lines.append(f"  missing in the file: {_some(missing)}")
    if unexpected:
        lines.append(f"  unknown to the model: {_some(unexpected)}")
    if differing:
        shapes = [f"{key}: {theirs} in the file, {ours} in the model" for key, (theirs, ours) in differing.items()]
        lines.append(f"  other shapes: {_some(shapes, '; ')}")
    if _only_head(model, differing) and not missing and not unexpected:
        classes = next(iter(differing.values()))[0][0]
        lines.append(
            f"only the classifier differs: --num-classes {classes} (num_classes={classes}) fits this file, "
            "and --new-head (new_head=True) leaves the model's own classifier as it is"
        )
    return "\n".join(lines)


def _some(items: list[str], separator: str = ", ") -> str:
    text = separator.join(items[:5])
    return text if len(items) <= 5 else f"{text}{separator}... ({len(items)} in all)"


def _first_line(error: BaseException) -> str:
    # Torch puts a call to load the file unsafely in front of what went wrong.
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
