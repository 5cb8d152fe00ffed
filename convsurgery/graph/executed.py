"""Every convolution that a forward pass executes, by whom: also those that no Conv2d module stands for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from convsurgery.geometry import OtherConv

__all__ = ["Executed", "is_convolution", "kind_of", "modules_on_stack"]

#: Composite ones arrive whole only inside ``torch.inference_mode``; elsewhere torch has made ``convolution`` of them.
_NAMES = frozenset(
    [
        "aten::convolution",
        "aten::_convolution",
        "aten::convolution_overrideable",
        "aten::conv1d",
        "aten::conv2d",
        "aten::conv3d",
        "aten::conv_transpose1d",
        "aten::conv_transpose2d",
        "aten::conv_transpose3d",
        "torchvision::deform_conv2d",
    ]
)


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return "" if schema is None else str(schema.name)


_known: dict[Any, bool] = {}


def is_convolution(func: Any) -> bool:
    """Whether an operator, as a dispatch mode is given it, is a convolution of any kind."""
    found = _known.get(func)
    if found is None:
        found = _known[func] = _name(func) in _NAMES
    return found


def kind_of(func: Any, args: Sequence[Any]) -> str:
    """ "2-d", "1-d", "3-d", "transposed 2-d" or "deformable"."""
    name = _name(func)
    if name.startswith("torchvision::"):
        return "deformable"
    transposed = "transpose" in name or (name.endswith("convolution") and len(args) > 6 and bool(args[6]))
    return f"{'transposed ' * transposed}{args[1].dim() - 2}-d"


@dataclass
class _Found:
    kind: str
    owner: str
    names: dict[str, None] = field(default_factory=dict)
    calls: int = 0


def modules_on_stack() -> Iterator[nn.Module]:
    """The modules whose methods are running, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                yield owner
        frame = frame.f_back


class Executed(TorchDispatchMode):
    """Counts convolutions, apart from the one that each call of a listed Conv2d makes.

    Args:
        root: the module that is run.
        running: names of the listed convolutions that are running, the innermost last; kept by others.
        strays: for the ``id`` of a Conv2d that was exchanged for a stand-in: its name. It must not run any more.
        direct: called with the name, input and output of a listed Conv2d that computes without having been called as a
            module: by its ``forward``, or by what holds it elsewhere.
    """

    def __init__(
        self,
        root: nn.Module,
        running: Sequence[str],
        strays: Mapping[int, str],
        direct: Callable[[str, Any, Any], None] = lambda name, given, out: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running, self.strays, self.direct = running, strays, direct
        self.names = {id(module): name for name, module in root.named_modules()}
        #: how many convolutions ran inside each listed Conv2d
        self.inside: Counter[str] = Counter()
        #: names of the exchanged convolutions that ran all the same
        self.astray: Counter[str] = Counter()
        self._others: dict[tuple[str, str], _Found] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_convolution(func):
            self._note(func, args, out)
        return out

    def _note(self, func: Any, args: Sequence[Any], out: Any) -> None:
        kind = kind_of(func, args)
        if self.running and kind == "2-d":
            self.inside[self.running[-1]] += 1
            return
        owner = self._owner()
        name = self.strays.get(id(owner)) or self.names.get(id(owner), "")
        if kind == "2-d" and isinstance(owner, nn.Conv2d) and (id(owner) in self.strays or id(owner) in self.names):
            if id(owner) in self.strays and not self._stands_for(owner):
                self.astray[name] += 1
            self.direct(name, args[0], out)
            return
        registered = id(owner) in self.names
        what = type(owner).__name__
        if kind == "2-d":
            if isinstance(owner, nn.Conv2d):
                kind = "unregistered"
            elif not isinstance(owner, torch.jit.ScriptModule):
                kind = "functional"
        found = self._others.setdefault((what, kind), _Found(kind, what))
        found.calls += 1
        if registered:
            found.names[self.names[id(owner)]] = None

    def _owner(self) -> nn.Module | None:
        """The innermost module whose method is on the stack."""
        return next(modules_on_stack(), None)

    def _stands_for(self, original: nn.Module) -> bool:
        """Whether a registered module on the stack computes by ``original``."""
        return any(
            id(module) in self.names and vars(module).get("_original") is original for module in modules_on_stack()
        )

    def others(self, calls: Mapping[str, int], scripted: Mapping[str, int]) -> tuple[OtherConv, ...]:
        """What was executed beyond one convolution for each of ``calls`` of the listed modules.

        Args:
            calls: of every listed convolution, by name.
            scripted: those of ``calls`` that stand for convolutions inside TorchScript, which no hook sees.
        """
        result = []
        unseen = sum(scripted.values())
        for found in self._others.values():
            count = found.calls
            if unseen and found.kind == "2-d":
                taken = min(unseen, count)
                unseen, count = unseen - taken, count - taken
            if count:
                result.append(OtherConv(found.kind, found.owner, tuple(found.names), count))
        for name, ran in self.inside.items():
            if ran > calls.get(name, 0):
                result.append(OtherConv("inside", "Conv2d", (name,), ran - calls.get(name, 0)))
        return tuple(result)
