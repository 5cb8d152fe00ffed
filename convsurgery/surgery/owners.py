"""Methods of other libraries' modules that take what is inside for convolutions: folding, and saving."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from convsurgery.errors import ConversionError, ConvSurgeryError, warn
from convsurgery.folding import WAY_OUT
from convsurgery.operators import Blend, OperatorLayer
from convsurgery.surgery.plan import Entry

__all__ = ["fold_notes", "guard_folds", "guard_saving"]

_METHOD = re.compile(
    r"fuse(_\w+)?|reparameteri[sz]e(_\w+)?|(switch|convert)_to_deploy|(fold|merge)_(bn|batch_?norm)\w*"
)


#: by class; weak, because rewritten modules bring classes that go with them
_known: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()


def _methods(kind: Any) -> tuple[str, ...]:
    """The methods of a class of modules by which timm, ultralytics and others fold what is inside."""
    if kind not in _known:
        names = [name for name in dir(kind) if _METHOD.fullmatch(name)]
        _known[kind] = tuple(name for name in names if callable(getattr(kind, name, None)))
    return _known[kind]


def _ancestors(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        while name:
            name = name.rpartition(".")[0]
            yield name


def fold_notes(entries: Sequence[Entry], modules: dict[str, nn.Module]) -> list[str]:
    """What a plan says of owners that fold what is to be replaced: that they are to do it before."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        if entry.config is None or entry.config.name == "conv" or entry.block is not None:
            continue
        for name in _ancestors(entry.site.names):
            methods = _methods(type(modules[name])) if name in modules else ()
            if methods:
                found.setdefault((type(modules[name]).__name__, methods[0]), []).append(name or "the model")
                break
    notes = []
    for (kind, method), names in found.items():
        count = len(dict.fromkeys(names))
        where = f"{names[0]} ({kind})" if count == 1 else f"{names[0]} and {count - 1} more ({kind})"
        notes.append(
            f"{where} can fold its convolutions by {method}: do it before the conversion if at all; afterwards it "
            "refuses the new layers it meets"
        )
    return notes


class FoldGuard:
    """Stands for a method of one module that folds convolutions; says what is wrong where the method trips over ours.

    Such methods ask their children for their class and fail bare, or worse, take the filters of the new layer: that
    one the layers themselves refuse.
    """

    def __init__(self, owner: nn.Module, method: str) -> None:
        self.owner, self.method = owner, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(self.owner)
        method: Callable[..., Any] = getattr(kind, self.method)
        inside = next((type(m).__name__ for m in self.owner.modules() if isinstance(m, (OperatorLayer, Blend))), None)
        try:
            return method(self.owner, *args, **kwargs)
        except ConvSurgeryError:
            raise
        except Exception as error:
            if inside is None:
                raise
            raise ConversionError(
                f"{kind.__name__}.{self.method} folds convolutions and found a {inside} "
                f"({type(error).__name__}: {error!s:.100}). {WAY_OUT}"
            ) from error


def guard_folds(root: nn.Module, undo: list[Callable[[], object]]) -> None:
    """Let the methods that fold what is inside of the modules around operators tell what is wrong."""
    modules = dict(root.named_modules(remove_duplicate=False))
    around: dict[int, nn.Module] = {}
    for name, module in modules.items():
        if isinstance(module, (OperatorLayer, Blend)):
            around.update({id(modules[owner]): modules[owner] for owner in _ancestors([name])})
    for owner in around.values():
        if isinstance(owner, (OperatorLayer, Blend)):
            continue
        for method in _methods(type(owner)):
            if method not in vars(owner):
                vars(owner)[method] = FoldGuard(owner, method)
                undo.append(functools.partial(vars(owner).pop, method, None))


class SavingGuard:
    """Stands for ``save_pretrained`` of a converted model: its own loader builds the model as it was."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        from convsurgery.surgery.storage import save

        kind: Any = type(self.owner)
        out = kind.save_pretrained(self.owner, save_directory, *args, **kwargs)
        folder = os.path.join(os.fspath(save_directory), _BESIDE)
        save(self.owner, folder, overwrite=True)
        warn(
            f"{kind.__name__}.from_pretrained builds the model as it was before the conversion and cannot read these "
            f"weights. The converted model is in {folder}: convsurgery.load(folder, base=the model as it was)"
        )
        return out


_BESIDE = "convsurgery"


def guard_saving(root: nn.Module, undo: list[Callable[[], object]]) -> None:
    """Let a library's own way of saving the model (Hugging Face's) write what can be loaded, and say how."""
    if callable(getattr(type(root), "save_pretrained", None)) and "save_pretrained" not in vars(root):
        vars(root)["save_pretrained"] = SavingGuard(root)
        undo.append(functools.partial(vars(root).pop, "save_pretrained", None))
