"""A saved model's folder as files: what its JSON may say, held against what ``save`` writes, and its two names."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convsurgery.errors import StorageError
from convsurgery.files import member, read_json
from convsurgery.surgery.weights import digest

__all__ = ["CONFIG", "FORMAT", "WEIGHTS", "digest_of", "pending", "read_config", "weights_file"]

FORMAT = 1
CONFIG = "convsurgery.json"
WEIGHTS = "model.safetensors"


def digest_of(config: Mapping[str, Any]) -> str:
    """SHA-256 of everything that ``convsurgery.json`` says, but for what it says of the weights and of itself."""
    rest = {key: value for key, value in config.items() if key != "weights"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def pending(sha256: str) -> str:
    return f".{WEIGHTS}.{sha256[:16]}"


def weights_file(folder: Path, config: Mapping[str, Any]) -> Path:
    """The file of weights that belongs to ``config``: of a save that was cut off it still has its other name."""
    described = config.get("weights")
    usual = folder / WEIGHTS
    if described is not None:
        waiting = folder / pending(described["sha256"])
        if os.path.lexists(waiting) and digest(member(folder, waiting.name)) == described["sha256"]:
            return waiting
    return member(folder, usual.name)


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}")
    waiting = any(folder.glob(f".{WEIGHTS}.*"))
    missing = [
        name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file() and not (name == WEIGHTS and waiting)
    ]
    if missing:
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise StorageError(f"{folder} is not a saved model: {' and '.join(missing)} missing; it holds {found}")
    path = member(folder, CONFIG)
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        version = config.get("format") if isinstance(config, dict) else None
        raise StorageError(f"{path} has format {version!r:.80}; this version of convsurgery reads {FORMAT}")
    for key, kind in _KINDS.items():
        if key not in config:
            raise StorageError(f"{path} has no {key!r}")
        if not isinstance(config[key], kind):
            raise StorageError(f"{path}: {key!r} is of the wrong kind, {type(config[key]).__name__}")
    more = sorted(set(config) - {*_KINDS, "format", "versions", "preprocessing", "origin", "weights", "reason"})
    if more:
        raise StorageError(f"{path}: {more[0]!r:.80} is nothing that this version of convsurgery writes")
    _check(config, path)
    return config


_KINDS: dict[str, type | tuple[type, ...]] = {
    "base": (dict, type(None)),
    "class": str,
    "plans": list,
    "norms": dict,
    "fused": bool,
    "frozen": list,
    "input_size": list,
}
#: pixels and channels of an input, each and together
_SIDE, _INPUT = 1 << 16, 1 << 28


def _check(config: Mapping[str, Any], path: Path) -> None:
    """The values of the keys, beyond their kinds."""
    size = config["input_size"]
    whole = all(type(number) is int and 1 <= number <= _SIDE for number in size)
    if len(size) != 3 or not whole or math.prod(size) > _INPUT:
        raise StorageError(f"{path}: 'input_size' is channels, height and width in pixels, not {size!r:.80}")
    for name, eps in config["norms"].items():
        if type(eps) not in (int, float) or not 0 <= eps <= 1e30:
            raise StorageError(f"{path}: 'norms' has no epsilon of at least 0 for {name!r:.80}")
    if not all(isinstance(name, str) for name in config["frozen"]):
        raise StorageError(f"{path}: 'frozen' is not a list of names")
    if not isinstance(config.get("reason", ""), str):
        raise StorageError(f"{path}: 'reason' is not a text")
    if not isinstance(config.get("origin", ""), str):
        raise StorageError(f"{path}: 'origin' is no text: {config['origin']!r:.80}")
    versions = config.get("versions", {})
    if not isinstance(versions, dict) or not all(isinstance(text, str) for text in versions.values()):
        raise StorageError(f"{path}: 'versions' is not a mapping of texts")
    described = config.get("weights")
    if described is None and "weights" not in config:
        return
    kinds = described.get("dtypes") if isinstance(described, dict) else None
    infinite = described.get("infinite") if isinstance(described, dict) else None
    if (
        not isinstance(described, dict)
        or set(described) != {"sha256", "dtypes", "infinite", "config"}
        or not all(re.fullmatch("[0-9a-f]{64}", str(described[key])) for key in ("sha256", "config"))
        or not (isinstance(kinds, dict) and all(type(count) is int for count in kinds.values()))
        or not (isinstance(infinite, list) and all(isinstance(name, str) for name in infinite))
    ):
        raise StorageError(f"{path}: 'weights' holds two digests, dtypes with their counts, and names in 'infinite'")
