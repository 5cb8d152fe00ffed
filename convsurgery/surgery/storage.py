"""A converted model as a folder: ``model.safetensors`` and ``convsurgery.json``.

Nothing in a folder is executed, fetched, or used as a path. What is read is held against what :func:`save` writes.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery import models as models  # its networks may be what is loaded
from convsurgery import zoo
from convsurgery.errors import ConvSurgeryError, ModelError, StorageError, warn
from convsurgery.files import input_path, is_folder_with, locked, refuse_existing, staging, with_usual_mode
from convsurgery.graph import copy_model
from convsurgery.surgery.apply import apply_
from convsurgery.surgery.folder import CONFIG, FORMAT, WEIGHTS, digest_of, pending, read_config, weights_file
from convsurgery.surgery.fuse import fuse
from convsurgery.surgery.plan import Plan
from convsurgery.surgery.rebuilt import difference, wrapped_inside
from convsurgery.surgery.record import Record, changed_names, record, set_record, unwrap, weights_of
from convsurgery.surgery.weights import describe, digest, header, load_weights

__all__ = ["CONFIG", "FORMAT", "WEIGHTS", "load", "load_weights", "named_folder", "read_weights_of", "save"]


def named_folder(text: str) -> tuple[Path | None, str]:
    """The saved folder that a text typed by the user names, if it names one, and what to say about it.

    A path (``./resnet18``, ``../out``, ``/models/out``) is a folder. A bare word is a model where timm or torchvision
    knows it, whatever lies in the working directory; otherwise a folder, where one of that name holds our JSON.

    Returns:
        The folder or None, and a sentence for the user, or "".
    """
    if text in (".", "..") or text.startswith(("./", "../", "/", "~", ".\\", "..\\")) or text.endswith("/"):
        return Path(text).expanduser(), ""
    if not is_folder_with(text, CONFIG):
        return None, ""
    if ":" in text.partition("/")[0] or zoo.is_plain_name(text.removeprefix("timm/")):
        return None, f"{text} is the library's model; the folder of that name is ./{text}"
    return Path(text), f"{text} is taken as the saved model in ./{text}"


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    base: str | zoo.Base | None = None,
    check: bool = True,
    overwrite: bool = True,
) -> Path:
    """Write ``model`` as a folder that :func:`load` reads back, bit for bit, buffers and shared tensors included.

    Before the folder appears it is read back once and compared with ``model``, the output on a random input included.
    Where what is built again is another model (somebody hung a hook on it, or exchanged a part), the folder says that
    its base has to be given to ``load``, and a warning says so at once.

    Args:
        model: converted or not; also wrapped by DistributedDataParallel or ``torch.compile``.
        directory: made when absent. An earlier save in it is replaced as a whole: a process that is killed at any
            moment leaves the old model or the new one. Other files stay.
        base: the timm or torchvision model it was built from. Found out by itself for models built by name, by
            ``timm.create_model`` or by a torchvision builder. A model of the user's own class has none: ``load`` then
            asks for one.
        check: whether to read it back; False where the same model is saved again and again, as in training.
        overwrite: whether a model or a run that is there already may be replaced.

    Returns:
        The folder's path.

    Raises:
        StorageError: when the folder cannot be written, holds something that may not be replaced, a weight is NaN, or
            ``model`` has what no folder holds: extra state that is no tensor, or a converted model inside.
    """
    if directory == "":
        raise StorageError("no folder given to save to; '.' is the one you are in")
    if not overwrite:
        refuse_existing(directory, folder=True)
    model = unwrap(model)
    inner = None if record(model) else wrapped_inside(model)
    if inner is not None:
        raise StorageError(
            f"{type(model).__name__} holds a converted model as {inner!r}, and only a converted model itself can be "
            f"saved: save(model.{inner}, …)"
        )
    _check_state(model)
    done = record(model) or Record(())
    known = zoo.Base(base) if isinstance(base, str) else base or zoo.identify(model, ignore=changed_names(done))
    config: dict[str, Any] = {
        "format": FORMAT,
        "base": None if known is None else known.to_json(),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "plans": [plan.to_dict() for plan in done.plans],
        "norms": dict(done.norms),
        "fused": done.fused,
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "input_size": list(zoo.input_size(model)),
        "preprocessing": zoo.preprocessing(model),
        "origin": str(weights_of(model)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "torchvision")},
    }
    folder = Path(directory)
    try:
        new = not folder.exists()
        parent = folder.parent if new else folder
        parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder that is to come, for it gets its name as a whole; inside the one that is there.
        with staging(parent, folder.name if new else "model") as temporary:
            whole = temporary / "whole"
            whole.mkdir()
            _write_weights(model, whole / WEIGHTS)
            with_usual_mode(whole / WEIGHTS)
            described = describe(model, whole / WEIGHTS)
            _write_config(config, described, whole)
            reason = _why_not(model, whole) if check and config["base"] is not None else None
            if reason is not None:
                config |= {"base": None, "reason": reason}
                _write_config(config, described, whole)
            if config["base"] is None and check:
                warn(_needed(folder, config))
            if new:
                os.rename(whole, folder)
            else:
                _commit(whole, folder, described["sha256"])
    except StorageError:
        raise
    except Exception as error:  # a full disk surfaces as whatever the writer of weights makes of it
        raise StorageError(f"cannot save to {folder}: {error}") from error
    return folder


def _write_config(config: Mapping[str, Any], described: Mapping[str, Any], whole: Path) -> None:
    content = {**config, "weights": {**described, "config": digest_of(config)}}
    (whole / CONFIG).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _why_not(model: nn.Module, whole: Path) -> str | None:
    """Why the folder that was just written does not give ``model`` again."""
    try:
        with torch.random.fork_rng(devices=[]):  # a model is built with random weights first
            loaded = _load(whole, None)
    except ConvSurgeryError as error:
        return re.sub(r"\s+", " ", str(error).replace(f"{whole}{os.sep}", ""))[:500]
    return difference(model, loaded)


def _needed(folder: Path, config: Mapping[str, Any]) -> str:
    """What to give to ``load``."""
    reason = config.get("reason") or f"{config['class']} is built by no name of timm or torchvision that fits"
    return f"{folder} does not say what it was built from: load({str(folder)!r}, base=the unconverted model). {reason}"


def _check_state(model: nn.Module) -> None:
    """What ``state_dict`` gives is tensors, and all that the modules have."""
    state = model.state_dict(keep_vars=True)
    strange = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
    if strange is not None:
        raise StorageError(
            f"{strange} is a {type(state[strange]).__name__}, no tensor (get_extra_state), "
            "and a folder holds tensors only"
        )
    for name, module in model.named_modules():
        kept = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
        for key in (*module._parameters, *kept):
            whole = f"{name}.{key}" if name else key
            if getattr(module, key, None) is not None and whole not in state:
                raise StorageError(
                    f"state_dict leaves out {whole}: a state_dict hook changes it. Remove the hook, save, and register "
                    "it again"
                )


def _write_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(model, str(path), metadata={"format": "pt"})


def _commit(whole: Path, folder: Path, sha256: str) -> None:
    """Let the two files take the place of earlier ones, so that ``load`` finds a pair at any moment.

    Two names cannot change in one step. So the new weights come first under a name that says their digest; the moment
    at which ``convsurgery.json`` names that digest is the moment of the change; then they get their usual name.
    """
    for name in (CONFIG, WEIGHTS):
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise StorageError(f"cannot save to {folder}: {name} there is no regular file of its own")
    with locked(folder):
        new = folder / pending(sha256)
        os.replace(whole / WEIGHTS, new)
        os.replace(whole / CONFIG, folder / CONFIG)
        os.replace(new, folder / WEIGHTS)
        for left in folder.glob(f".{WEIGHTS}.*"):
            left.unlink()


@torch.inference_mode(False)
def load(directory: str | os.PathLike[str], *, base: nn.Module | None = None) -> nn.Module:
    """The model a folder holds, in eval mode, on the CPU.

    The folder may be a stranger's. Its base is a plain name of timm's or torchvision's and architecture arguments,
    built without weights; weights come from ``model.safetensors`` alone, which has to be the file that was saved.

    Args:
        directory: what :func:`save` wrote.
        base: the unconverted model, for models of a class that neither timm nor torchvision builds; a copy is used.

    Raises:
        StorageError: for a folder that is missing, incomplete, corrupt or written by something else; nothing in it is
            executed, fetched, or used as a path. A folder of a version that kept no digest is read with a warning.
    """
    folder = input_path(directory)
    # Who saves into the folder meanwhile waits: the two files are read as a pair.
    with locked(folder, shared=True):
        return _load(folder, base)


def _load(folder: Path, base: nn.Module | None) -> nn.Module:
    config = read_config(folder)
    try:
        plans = tuple(map(Plan.from_dict, config["plans"]))
    except StorageError as error:
        raise StorageError(f"{folder / CONFIG}: {error}") from error
    weights = weights_file(folder, config)
    held = header(weights)
    with _budget(held):
        model: nn.Module = _base(folder, config, base, held, plans)
        model = _converted(folder, config, model, plans)
    load_weights(model, weights, config.get("weights"))
    wanted = (config.get("weights") or {}).get("sha256")
    if wanted is None:
        warn(f"{folder} was written before a digest of weights was kept: they are not known to be those of its plan")
    elif digest(weights) != wanted:
        raise StorageError(
            f"{weights} is not the file that was saved: its SHA-256 is not the one {CONFIG} says. It was damaged or "
            "exchanged; nothing was loaded"
        )
    elif config["weights"]["config"] != digest_of(config):
        raise StorageError(f"{folder / CONFIG} was changed after it was saved: its SHA-256 is not the one that it says")
    frozen, names = set(config["frozen"]), {name for name, _ in model.named_parameters()}
    if strange := sorted(frozen - names):
        raise StorageError(f"{folder / CONFIG}: 'frozen' names {strange[0]!r:.80}, which is no parameter of the model")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
    channels, height, width = config["input_size"]
    zoo.set_input_size(model, (channels, height, width))
    if "origin" in config:
        zoo.note_origin(model, zoo.Origin.parse(config["origin"]))
    return model.eval()


def _converted(folder: Path, config: Mapping[str, Any], model: nn.Module, plans: tuple[Plan, ...]) -> nn.Module:
    """The base with everything done to it that was done before it was saved, but for the weights."""
    try:
        for plan in plans:
            model = apply_(model, plan, quiet=True)
        modules = dict(model.named_modules())
        for name, eps in config["norms"].items():
            if name not in modules:
                raise StorageError(f"{folder / CONFIG}: the base model has no module {name!r:.80}")
            if not isinstance(getattr(modules[name], "eps", None), float):
                raise StorageError(f"{folder / CONFIG}: 'norms' names {name!r:.80}, which has no epsilon")
            modules[name].eps = float(eps)
        if config["fused"]:
            model = fuse(model)
    except StorageError:
        raise
    except ConvSurgeryError as error:
        raise StorageError(f"{folder / CONFIG} does not fit its base model: {error}") from error
    except Exception as error:  # a plan that no version of ours has made may break off anywhere
        raise StorageError(
            f"{folder / CONFIG} does not fit its base model ({type(error).__name__}: {error!s:.200})"
        ) from error
    done = record(model) or Record(())
    set_record(model, Record(done.plans, dict(config["norms"]), bool(config["fused"])))
    return model


def read_weights_of(folder: Path) -> tuple[Path, Mapping[str, Any] | None]:
    """The weights of a saved folder and what its JSON says of them, for :func:`load_weights`; the digest is checked.

    Raises:
        StorageError: as :func:`load`.
    """
    config = read_config(folder)
    path, described = weights_file(folder, config), config.get("weights")
    if described is not None and digest(path) != described["sha256"]:
        raise StorageError(f"{path} is not the file that was saved: its SHA-256 is not the one {CONFIG} says")
    return path, described


#: what a base may have more than the file: a replaced convolution leaves far fewer values than it had
_FACTOR, _FREE_ELEMENTS, _FREE_TENSORS = 64, 1 << 27, 20_000


def _budget(held: Mapping[str, tuple[tuple[int, ...], str]]) -> zoo.Budget:
    elements = sum(math.prod(shape) for shape, _ in held.values())
    # The base is built twice, without memory and with it, and operators are built beside their convolutions.
    return zoo.Budget(4 * (_FACTOR * elements + _FREE_ELEMENTS), 64 * len(held) + _FREE_TENSORS)


def _base(
    folder: Path,
    config: Mapping[str, Any],
    base: nn.Module | None,
    held: Mapping[str, tuple[tuple[int, ...], str]],
    plans: tuple[Plan, ...],
) -> nn.Module:
    path = folder / CONFIG
    if base is not None:
        model = copy_model(base)
    elif config["base"] is None:
        reason = config.get("reason")
        raise StorageError(
            f"{folder} holds a model of class {config['class']}, which neither timm nor torchvision builds by a name "
            "known here; pass the unconverted model: load(directory, base=model)"
            + (f". When it was saved: {reason!s:.500}" if reason else "")
        )
    else:
        try:
            known = zoo.Base.from_json(config["base"])
        except ModelError as error:
            raise StorageError(f"the base model of {folder} cannot be built: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(f"{path}: 'base' is not what convsurgery writes: {error}") from error
        try:
            kwargs = dict(known.kwargs)
            _same_shapes(zoo.create_model(known.name, device="meta", **kwargs), held, plans, path)
            model = zoo.create_model(known.name, pretrained=False, **kwargs)
        except ModelError as error:
            raise StorageError(f"the base model of {folder} cannot be built: {error}") from error
    if config.get("preprocessing") is not None:
        zoo.set_preprocessing(model, config["preprocessing"], f"{path}: preprocessing")
    return model


def _same_shapes(
    skeleton: nn.Module, held: Mapping[str, tuple[tuple[int, ...], str]], plans: tuple[Plan, ...], path: Path
) -> None:
    """Before memory is taken: what no plan has changed has the shapes of the file."""
    changed = tuple(f"{name}." for name in changed_names(Record(plans)))
    for name, tensor in skeleton.state_dict().items():
        shape = held[name][0] if name in held else None
        if shape is not None and not name.startswith(changed) and tuple(tensor.shape) != shape:
            raise StorageError(
                f"{path.with_name(WEIGHTS)} does not fit the model: {name} has shape {shape} there, "
                f"{tuple(tensor.shape)} in the base model"
            )
