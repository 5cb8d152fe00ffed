"""What hooks and modes note while a forward runs: calls of convolutions and norms, and weights read elsewhere."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from convsurgery.graph.executed import modules_on_stack

__all__ = ["Call", "ReadsOutside", "Watch", "hooked", "is_scripted_conv"]


@dataclass
class Call:
    """What the hooks saw of one convolution; shapes are those of the first call.

    ``positions`` counts output pixels over all calls, for each image that the model was given.
    """

    index: int
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    calls: int = 0
    positions: int = 0


class Watch:
    """Takes down the calls as the hooks report them."""

    def __init__(self, images: int) -> None:
        self.images = max(1, images)
        self.calls: dict[str, Call] = {}
        self.norms: Counter[str] = Counter()
        self.running: list[str] = []
        self.scripted: Counter[str] = Counter()
        self.bypassed: set[str] = set()

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running.append(name)
        x = args[0] if args else next(iter(kwargs.values()), None)
        call = self.calls.setdefault(name, Call(len(self.calls)))
        call.calls += 1
        if call.input_shape is None and isinstance(x, Tensor):
            call.input_shape = tuple(int(n) for n in x.shape)

    def leave(self, name: str, out: Any) -> None:
        self.running.pop()
        if not isinstance(out, Tensor):
            return
        call, shape = self.calls[name], tuple(int(n) for n in out.shape)
        if call.output_shape is None:
            call.output_shape = shape
        # Without a batch there are three dimensions; detection heads run on many regions of an image.
        maps = shape[0] if len(shape) == 4 else self.images
        call.positions += shape[-1] * shape[-2] * max(1, round(maps / self.images))

    def direct(self, name: str, given: Tensor, out: Tensor) -> None:
        """A convolution that computes without having been called as a module."""
        self.enter(name, (given,), {})
        self.leave(name, out)
        self.bypassed.add(name)

    def count_norm(self, name: str) -> None:
        self.norms[name] += 1

    def enter_scripted(self, names: Sequence[str]) -> None:
        """A TorchScript module is opaque: its convolutions are taken to run once each, as they are registered."""
        for name in names:
            self.calls.setdefault(name, Call(len(self.calls))).calls += 1
            self.scripted[name] += 1


@contextmanager
def hooked(convs: Mapping[str, nn.Module], root: nn.Module, watch: Watch) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in convs.items():
            before = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: watch.enter(name, args, kwargs), with_kwargs=True, prepend=True
            )
            after = module.register_forward_hook(lambda _, args, out, name=name: watch.leave(name, out))
            stack.callback(before.remove)
            stack.callback(after.remove)
        for name, module in list(root.named_modules()):
            if isinstance(module, _BatchNorm) and not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(lambda *_, name=name: watch.count_norm(name)).remove)
            for child, part in module.named_children():
                if isinstance(part, torch.jit.ScriptModule) and not isinstance(module, torch.jit.ScriptModule):
                    module._modules[child] = _Scripted(part, f"{name}.{child}" if name else child, watch)
                    stack.callback(module._modules.__setitem__, child, part)
        yield


class _Scripted(nn.Module):
    """Stands around a TorchScript module, which takes no hooks, and reports its calls."""

    def __init__(self, module: nn.Module, name: str, watch: Watch) -> None:
        super().__init__()
        self.inner, self.watch = module, watch
        inside = [below for below, part in module.named_modules() if is_scripted_conv(part)]
        self.convs = [f"{name}.{below}" if below else name for below in inside]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.enter_scripted(self.convs)
        return self.inner(*args, **kwargs)


def is_scripted_conv(module: nn.Module) -> bool:
    """Whether ``module`` is a Conv2d inside a module compiled by ``torch.jit.script``."""
    return isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", "") == "Conv2d"


class ReadsOutside(TorchFunctionMode):
    """Notes convolutions whose weight goes into a computation while another module runs."""

    def __init__(self, owners: Mapping[int, str], running: Sequence[str], convs: Mapping[int, str]) -> None:
        self.owners, self.running, self.convs, self.found = owners, running, convs, set[str]()
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor | tuple | list):  # not the likes of ``weight.dtype``
            for argument in itertools.chain(args, (kwargs or {}).values()):
                for value in argument if isinstance(argument, tuple | list) else (argument,):
                    owner = self.owners.get(id(value))
                    if owner is None or owner in self.running or func.__name__ == "__get__":
                        continue
                    # Somebody may call its forward past the hooks.
                    if not any(self.convs.get(id(module)) == owner for module in modules_on_stack()):
                        self.found.add(owner)
        return out
