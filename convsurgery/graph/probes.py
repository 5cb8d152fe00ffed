"""Stand-ins for convolutions: what a forward pass calls when every convolution has been replaced.

A replacement is no Conv2d, and stands where the table of children and the containers that are followed had the
convolution. A pass with stand-ins that are just so shows, before anything is edited, whether it would be what runs.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from torch import nn

from convsurgery.graph.holders import holders

__all__ = ["Probes"]


class _Probe(nn.Module):
    """Computes what the convolution computes, has its attributes, and is no Conv2d."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_original"].forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            mine = self.__dict__
            if "_asked" in mine and hasattr(mine["_kind"], name):
                mine["_asked"].setdefault(mine["_site"], name)
            raise


@functools.cache
def _probe_class(name: str) -> type[nn.Module]:
    return type(name, (_Probe,), {"__module__": nn.Module.__module__})


class Probes:
    """Puts a twin with the same tensors in every convolution's place.

    Args:
        skeleton: changed; its twins stay, with the classes of the originals once :meth:`settle` was called.
        plain: names of convolutions that stay themselves.

    Attributes:
        root: the skeleton, or its twin where it is itself a convolution.
        names: of all convolutions, twins or not.
        strays: for the ``id`` of every original, its name.
        asked: for convolutions of which the forward wanted something that only a Conv2d has: what.
    """

    def __init__(self, skeleton: nn.Module, plain: Collection[str] = ()) -> None:
        self.root = skeleton
        self.names: set[str] = set()
        self.strays: dict[int, str] = {}
        self.asked: dict[str, str] = {}
        self._originals: list[nn.Module] = []  # an id is one as long as its object lives
        self._twins: list[tuple[nn.Module, type[nn.Module]]] = []
        twins: dict[int, nn.Module] = {}
        held = holders(skeleton)
        for name, module in skeleton.named_modules():
            if isinstance(module, nn.Conv2d):
                self.names.add(name)
                if name not in plain:
                    twins[id(module)] = self._twin(name, module)
        if not twins:
            return
        for parent in list(skeleton.modules()):
            for key, child in parent._modules.items():
                if id(child) in twins:
                    parent._modules[key] = twins[id(child)]
        for original in held.keys() & twins.keys():
            for place in held[original]:
                if place.put is not None:
                    place.put(twins[original])
        self.root = twins.get(id(skeleton), skeleton)

    def _twin(self, name: str, module: nn.Module) -> nn.Module:
        kind: Any = type(module)
        twin: nn.Module = kind.__new__(kind)
        # Hooks are added to the twin alone; everything else is shared.
        twin.__dict__.update(
            (key, type(value)(value) if "hooks" in key and isinstance(value, dict) else value)
            for key, value in vars(module).items()
        )
        self.strays[id(module)] = name
        self._originals.append(module)
        twin.__dict__.update(_original=module, _kind=kind, _site=name, _asked=self.asked)
        twin.__class__ = _probe_class(kind.__name__)
        self._twins.append((twin, kind))
        return twin

    def settle(self) -> None:
        """Give the stand-ins the classes of what they stand for."""
        for twin, kind in self._twins:
            for key in ("_original", "_kind", "_site", "_asked"):
                twin.__dict__.pop(key, None)
            twin.__class__ = kind
        self._twins.clear()
