"""Model names of timm and torchvision, and the record of what a model was built from."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from convsurgery.errors import ModelError
from convsurgery.zoo.allowed import TORCHVISION, check_arguments, check_recorded_name

__all__ = ["TORCHVISION", "Base", "canonical_name", "check_name", "list_models"]


@dataclass(frozen=True)
class Base:
    """What a model was built from: ``create_model(base.name, **base.kwargs)`` builds its structure again.

    A base may come from a file, so it holds a plain name of timm's or torchvision's and architecture arguments in plain
    JSON, and nothing else: what a base builds has random weights, and nothing is read, fetched or written for it.
    ``kwargs`` are kept in the form JSON gives back (tuples as lists), so that a stored base equals the original.

    Raises:
        TypeError: when a keyword argument has no JSON form, as a class or a function.
        ModelError: for a name that leads elsewhere (``hf-hub:``, ``local-dir:``, a path), for arguments that are no
            architecture (weights, checkpoints, caches, configs, devices), and values out of bounds.

    >>> Base.from_json(Base("resnet18", {"num_classes": 10}).to_json())
    Base(name='resnet18', kwargs={'num_classes': 10})
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", canonical_name(self.name))
        object.__setattr__(self, "kwargs", json.loads(json.dumps(dict(self.kwargs))))
        check_recorded_name(self.name, "base.name")
        check_arguments(self.name, self.kwargs, "base.kwargs")

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``json.dumps`` takes."""
        return {"name": self.name, "kwargs": json.loads(json.dumps(self.kwargs))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Base:
        """The base that :meth:`to_json` described.

        Raises:
            ModelError: for anything of another form.
        """
        name, kwargs = (data.get("name"), data.get("kwargs", {})) if isinstance(data, Mapping) else (None, None)
        more = sorted(map(str, set(data) - {"name", "kwargs"})) if isinstance(data, Mapping) else []
        if more:
            raise ModelError(f"base.{more[0][:80]} is nothing that a saved model holds")
        if not isinstance(name, str) or not isinstance(kwargs, Mapping):
            raise ModelError(f"a base model is written as {{'name': ..., 'kwargs': {{...}}}}, not as {data!r:.200}")
        return cls(name, kwargs)


def canonical_name(name: str) -> str:
    """``timm/resnet18`` as ``resnet18``; every other name as itself."""
    return name.removeprefix("timm/")


def list_models(pattern: str = "*") -> list[str]:
    """Names :func:`create_model` takes that match a shell pattern: timm's, then torchvision's as ``torchvision/name``.

    A timm name is listed without its tags, unless the pattern has a dot.

    >>> list_models("*vgg11")
    ['vgg11', 'torchvision/vgg11']
    """
    import timm
    import torchvision

    pattern = canonical_name(pattern)
    names = timm.list_models(include_tags="." in pattern)
    names += [TORCHVISION + name for name in torchvision.models.list_models()]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def check_name(name: str) -> None:
    """Refuse a name that neither library knows.

    Raises:
        ModelError: with the nearest names, or with the tags when only the tag is wrong.
    """
    import timm
    import torchvision

    if name.startswith(TORCHVISION):
        if name.removeprefix(TORCHVISION) not in torchvision.models.list_models():
            raise ModelError(f"torchvision has no model {name.removeprefix(TORCHVISION)!r}; {_nearest(name)}")
        return
    if ":" in name or "/" in name:
        # A hub repository or a folder: only timm can tell whether it exists.
        return
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        raise ModelError(f"no model is called {name!r}; {_nearest(arch)}")
    tagged = timm.list_models(f"{arch}.*", include_tags=True)
    # Deprecated names are not listed; timm maps them, tag and all.
    if tag and name not in tagged and (tagged or arch in timm.list_models(arch)):
        tags = ", ".join(key.partition(".")[2] for key in tagged)
        known = f"its tags are {tags}" if tags else "it has no tags"
        raise ModelError(f"timm's {arch!r} has no weights tagged {tag!r}; {known}")


def _nearest(name: str) -> str:
    names = list_models()
    plain = name.removeprefix(TORCHVISION)
    # The right name with the wrong library in front comes first.
    close = [known for known in names if known.removeprefix(TORCHVISION) == plain]
    close += [known for known in _close(name, names) if known not in close]
    if not close:
        return "convsurgery.zoo.list_models() lists the names that are known"
    return "did you mean " + " or ".join(repr(known) for known in close[:3]) + "?"


def _close(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
