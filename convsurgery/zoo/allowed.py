"""What the record of a base model may hold: a plain name and architecture arguments, nothing that reads or fetches.

Folders, recipes and ONNX files are data that a stranger may have written, and what they record goes to the builders of
timm and torchvision. So it is checked against what a builder knows as architecture, never against a list of dangers
alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from convsurgery.errors import ModelError, nearest

__all__ = ["TORCHVISION", "allowed_arguments", "check_arguments", "check_recorded_name", "is_plain_name"]

TORCHVISION = "torchvision/"

#: never part of an architecture, whoever's builder has an argument of that name
# fmt: off
_NEVER = frozenset((
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn",
    "pretrained_model_args", "pretrained_custom_load", "checkpoint", "checkpoint_path", "ckpt", "cache_dir",
    "scriptable", "exportable", "no_jit", "weights", "weights_backbone", "progress", "init_weights", "device",
    "dtype", "url", "file", "path", "root", "hub_id", "hf_hub_id", "hf_hub_filename", "state_dict", "config",
    "cfg", "cfgs", "model_cfg", "feature_cfg", "kwargs_filter", "default_cfg", "source", "custom_load",
    "module", "forward", "name", "model_name", "model", "model_cls", "variant", "arch", "builder",
    "load_bfloat16", "self", "args", "kwargs",
))
# fmt: on
#: what timm's model builder takes itself, before the class sees the rest
# fmt: off
_TIMM = frozenset((
    "num_classes", "in_chans", "img_size", "global_pool", "output_stride", "drop_rate", "drop_path_rate",
    "features_only", "out_indices", "feature_cls", "flatten_sequential", "output_fmt", "bn_eps", "bn_momentum",
    "bn_tf", "norm_kwargs", "pad_type", "se_layer", "act_layer", "norm_layer", "aa_layer",
))
# fmt: on
_TORCHVISION = frozenset(("num_classes", "img_size", "norm_layer", "aux_loss", "trainable_backbone_layers", "quantize"))

#: parts of names that speak of weights, files and places
_SUSPECT = re.compile(
    r"(^|_)(urls?|files?|filenames?|caches?|state_dict|ckpt|hub|downloads?|configs?|cfgs?|overlay|device|source)(_|$)"
    r"|pretrained(?!_window_sizes?$)|checkpoint_path|weights_path"
)
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_WORD = re.compile(r"[A-Za-z0-9_+\-. ]{0,64}")
#: entries of all lists and mappings together, and how deep they may lie in one another
_ENTRIES, _DEPTH = 4096, 6
#: the largest numbers: classes of a face recogniser; and of everything else (a builder may make a list of any depth)
_MOST_CLASSES, _LARGEST = 1 << 24, 1 << 16


def is_plain_name(name: str) -> bool:
    """Whether timm's registry or torchvision's lists ``name``: no folder, no hub, nothing to fetch."""
    import timm
    import torchvision

    if name.startswith(TORCHVISION):
        return name.removeprefix(TORCHVISION) in torchvision.models.list_models()
    return _NAME.fullmatch(name) is not None and timm.is_model(name.partition(".")[0])


def check_recorded_name(name: str, where: str) -> None:
    """Refuse what is no plain name; ``where`` begins the text.

    Raises:
        ModelError: for hub names, folders, paths, and names that neither library knows.
    """
    if is_plain_name(name):
        return
    if ":" in name or "/" in name.removeprefix(TORCHVISION) or "\\" in name:
        raise ModelError(
            f"{where}: {name[:80]!r} leads to a folder or to the network; a file may name a model of timm's or "
            "torchvision's by its plain name alone"
        )
    from convsurgery.zoo.names import check_name

    try:
        check_name(name[:80])
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    raise ModelError(f"{where}: no model is called {name[:80]!r}")


def check_arguments(name: str, kwargs: Mapping[str, Any], where: str) -> None:
    """Refuse keyword arguments that are no architecture of the model ``name``, or no plain and bounded JSON.

    Args:
        name: that :func:`check_recorded_name` has let pass.
        kwargs: as read.
        where: begins the text, such as "base.kwargs".

    Raises:
        ModelError: naming the argument.
    """
    known = allowed_arguments(name)
    for key, value in kwargs.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key) or _never(key):
            shown = key if isinstance(key, str) and _KEY.fullmatch(key) else repr(key)[:80]
            raise ModelError(f"{where}.{shown} is nothing that a saved model holds")
        if key not in known:
            raise ModelError(f"{where}.{key} is no architecture argument of {name}; {nearest(key, known)[:200]}")
        most = _MOST_CLASSES if key == "num_classes" else _LARGEST
        _check_value(value, f"{where}.{key}", [_ENTRIES], _DEPTH, most)


def _check_value(value: Any, where: str, left: list[int], depth: int, most: int = _LARGEST) -> None:
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        raise ModelError(f"{where} is larger or deeper than anything a saved model holds")
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int | float):
        if not math.isfinite(value) or abs(value) > most:
            raise ModelError(f"{where} is out of range: a saved model holds numbers up to {most:,}")
        return
    if isinstance(value, str):
        # No path, no address: separators have no place in the name of a layer or a mode.
        if not _WORD.fullmatch(value) or ".." in value or value.startswith("."):
            raise ModelError(f"{where}: {value[:80]!r} is no word that a saved model holds")
        return
    if isinstance(value, list):
        for item in value:
            _check_value(item, where, left, depth - 1)
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key) or _never(key):
                raise ModelError(f"{where}.{str(key)[:80]} is nothing that a saved model holds")
            _check_value(item, f"{where}.{key}", left, depth - 1)
        return
    raise ModelError(f"{where} is a {type(value).__name__}, not plain JSON")


@functools.lru_cache(maxsize=256)
def allowed_arguments(name: str) -> frozenset[str]:
    """Architecture arguments of a model: what its builder and the classes of its file take, but nothing of weights."""
    import timm
    import torchvision

    if name.startswith(TORCHVISION):
        builder, common = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION)), _TORCHVISION
    else:
        builder, common = timm.model_entrypoint(name.partition(".")[0]), _TIMM
    found = set(common) | _parameters(builder)
    for name_, value in list(vars(sys.modules[builder.__module__]).items()):
        if inspect.isclass(value) and issubclass(value, nn.Module):
            # The classes of whole models: blocks and layers have no classes to tell.
            own = [base for base in value.__mro__ if base not in nn.Module.__mro__]
            options = set().union(*(_parameters(vars(base).get("__init__")) for base in own))
            if "num_classes" in options:
                found |= options
        elif dataclasses.is_dataclass(value):
            # timm's ByoModelCfg, RegNetCfg, ...: what a builder may be told instead of its table.
            found |= {field.name for field in dataclasses.fields(value)}
        elif inspect.isfunction(value) and value.__module__ == builder.__module__ and name_.startswith("_"):
            # torchvision's _mobilenet_v3_conf, timm's _gen_...: they take part of the keyword arguments.
            found |= _parameters(value)
    return frozenset(key for key in found if not _never(key))


def _never(key: str) -> bool:
    return key in _NEVER or _SUSPECT.search(key) is not None


def _parameters(function: Any) -> set[str]:
    try:
        items = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {item.name for item in items if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
