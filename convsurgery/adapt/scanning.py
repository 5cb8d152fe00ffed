"""One convolution replaced at a time: how far all batches have come in the model, and what a new layer does there.

A model that FX traces is computed once, node by node, for all batches together. At every site the values that are
still needed wait there, and each operator computes only what comes behind.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from convsurgery.adapt.answers import Answers
from convsurgery.adapt.fitting import fit_method
from convsurgery.adapt.losses import logits_of
from convsurgery.adapt.timing import now
from convsurgery.errors import ConversionError, ModelError
from convsurgery.geometry import Site
from convsurgery.graph.copying import computed_attributes, copy_modules
from convsurgery.graph.tracing import trace
from convsurgery.operators import OperatorConfig, OperatorLayer, Start
from convsurgery.operators.moments import Moments
from convsurgery.surgery.absorb import can_absorb
from convsurgery.surgery.apply import build_layer

__all__ = ["Damage", "New", "Stand", "Walk", "build", "measure", "saved_ms", "twin_of", "walk"]

#: values that are added up at a time: sums in float64 are fast while their temporaries stay in the cache
_CHUNK = 2**17
#: values of a layer's input and output that a fit works on at a time, as in ``fitting``
_FITTED = 2**21
#: images that a layer is timed on
_TIMED = 16

Pairs = list[tuple[Tensor, Tensor]]


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode that shares the parameters of ``model``; buffers are its own."""
    memo = computed_attributes(model, Tensor.clone)
    memo.update((id(parameter), parameter) for parameter in model.parameters())
    try:
        return copy_modules(model, memo).eval()
    except Exception as error:
        raise ModelError(f"the model cannot be copied, so it cannot be scanned: {error}") from error


def walk(twin: nn.Module, batches: Sequence[Tensor]) -> Walk:
    """The way through ``twin``, with all batches (N, C, H, W) at its beginning."""
    probe = batches[0][:2]
    wanted = logits_of(twin(probe.clone()))
    try:
        made = Walk(twin, trace(twin), "FX: only what comes behind each site is computed again")
        given = logits_of(made.run(made.begin(probe), 0))
        room = 1e-3 * float(wanted.abs().max())
        if given.shape != wanted.shape or not torch.allclose(given, wanted, rtol=1e-3, atol=room, equal_nan=True):
            raise ModelError("its graph computes something else")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        made = _whole(twin, f"whole forwards, one for each site and operator (FX: {reason})")
    made.environments = [made.begin(batch) for batch in batches]
    return made


def _whole(twin: nn.Module, seen: str) -> Walk:
    """A graph of one node for a model that has no other: every site lies inside of it."""
    graph = fx.Graph()
    graph.output(graph.call_module("model", (graph.placeholder("x"),)))
    return Walk(nn.ModuleDict({"model": twin}), graph, seen)


@dataclass(frozen=True)
class Stand:
    """What is known at a site before anything is replaced there.

    Attributes:
        conv: the convolution, of the twin.
        place: position of the first node that can call it.
        known: whether this node is the convolution itself, called there alone; its output is then simply put there.
        calls: for each batch the convolution's inputs and outputs, call by call.
    """

    conv: nn.Conv2d
    place: int
    known: bool
    calls: list[Pairs]


class Walk:
    """The nodes of a graph, and for every batch the values that are still needed in front of ``position``."""

    def __init__(self, root: nn.Module, graph: fx.Graph, seen: str) -> None:
        self.root, self.seen, self.position = root, seen, 0
        self.nodes = list(graph.nodes)
        self.environments: list[dict[fx.Node, Any]] = []
        self.last = {node: index for index, node in enumerate(self.nodes)}
        self.homes: dict[int, list[int]] = {}
        for index, node in enumerate(self.nodes):
            self.last.update(dict.fromkeys(node.all_input_nodes, index))
            if node.op == "call_module":
                for part in root.get_submodule(node.target).modules():
                    if isinstance(part, nn.Conv2d):
                        self.homes.setdefault(id(part), []).append(index)
        self.dropped: dict[int, list[fx.Node]] = {}
        for node, index in self.last.items():
            self.dropped.setdefault(index, []).append(node)
        self.own = {id(tensor) for tensor in itertools.chain(root.parameters(), root.buffers())}

    def begin(self, batch: Tensor) -> dict[fx.Node, Any]:
        """Where a batch starts; a copy, for a model may work on its images in place."""
        return {self.nodes[0]: batch.clone()}

    def run(self, values: dict[fx.Node, Any], position: int, end: int | None = None) -> Any:
        """Compute from ``position`` to ``end``, excluded, in place in ``values``; returns what the last node gave.

        Nodes whose value is there already are not computed.
        """
        value: Any = None
        for index in range(position, len(self.nodes) if end is None else end):
            node = self.nodes[index]
            if node not in values:
                values[node] = self._value(node, values)
            value = values[node]
            for done in self.dropped.get(index, ()):
                values.pop(done, None)
        return value

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
        target: Any = node.target
        if node.op == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "get_attr":
            value: Any = self.root
            for name in target.split("."):
                value = getattr(value, name)
            return value
        if node.op == "placeholder" and not args:
            raise ModelError(f"its forward takes {target!r} besides images")
        return args[0]

    def place(self, conv: nn.Module) -> int:
        """Position of the first node that can call ``conv``."""
        return self.homes.get(id(conv), [0])[0]

    def stand(self, conv: nn.Conv2d) -> Stand:
        """Go on to ``conv`` with all batches, and see what it is given and gives."""
        places = self.homes.get(id(conv)) or [0, len(self.nodes) - 1]
        place, node = places[0], self.nodes[places[0]]
        for values in self.environments:
            self.run(values, self.position, place)
        self.position = place
        alone = len(places) == 1 and node.op == "call_module" and self.root.get_submodule(node.target) is conv
        if alone and len(node.args) == 1 and not node.kwargs:
            inputs = [values[node.args[0]] for values in self.environments]
            return Stand(conv, place, True, [[(x, conv(x))] for x in inputs])
        return Stand(conv, place, False, self._watched(conv, place, places[-1] + 1))

    def _watched(self, conv: nn.Conv2d, place: int, end: int) -> list[Pairs]:
        """Inputs and outputs of ``conv`` between two positions."""
        found: list[Pairs] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            # What comes behind may work in place.
            x = args[0] if args else next(iter(kwargs.values()))
            found[-1].append((x.clone(), out.clone()))

        handle = conv.register_forward_hook(note, with_kwargs=True)
        try:
            for values in self.environments:
                found.append([])
                self.run(self._copied(values, place), place, end)
        finally:
            handle.remove()
        return found

    def leave(self, stand: Stand) -> None:
        """Take the convolution's outputs over, so that they need not be computed again."""
        if stand.known:
            for values, calls in zip(self.environments, stand.calls, strict=True):
                values[self.nodes[stand.place]] = calls[0][1]

    def answer(self, number: int, stand: Stand, output: Tensor | None = None) -> Tensor:
        """The scores (N, classes) of one batch from ``stand`` on, with ``output`` for the convolution's where known."""
        values = self.environments[number]
        if output is None:
            values = self._copied(values, stand.place)
        else:
            values = self._copied(values, stand.place + 1)
            values[self.nodes[stand.place]] = output
        return logits_of(self.run(values, stand.place))

    def _copied(self, values: Mapping[fx.Node, Any], needed: int) -> dict[fx.Node, Any]:
        """Copies of what is used at ``needed`` or behind; tensors that share memory share it in the copies too."""
        memo: dict[int, Any] = {}

        def copied(tensor: Tensor) -> Tensor:
            return tensor if id(tensor) in self.own else copy.deepcopy(tensor, memo)

        kept = {node: value for node, value in values.items() if self.last[node] >= needed}
        return {node: tree_map_only(Tensor, copied, value) for node, value in kept.items()}


@contextmanager
def _swapped(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Other modules under all names of some, while it lasts."""
    places = [
        (module._modules, name, child)
        for module in root.modules()
        for name, child in module._modules.items()
        if child in new
    ]
    try:
        for table, name, child in places:
            table[name] = new[child]  # type: ignore[index]
        yield
    finally:
        for table, name, child in places:
            table[name] = child


@dataclass(frozen=True)
class New:
    """A layer in a convolution's place.

    Attributes:
        layer: the layer, fitted where it starts from data.
        modules: what stands in whose place: the layer, and a BatchNorm that took over an offset.
        offset: this offset, (C_out,); what is to be added to the layer's output.
    """

    layer: nn.Module
    modules: Mapping[nn.Module, nn.Module]
    offset: Tensor | None = None


def build(twin: nn.Module, site: Site, config: OperatorConfig, start: Start, stand: Stand) -> New:
    """The layer that ``config`` puts at ``site``, fitted to the inputs of ``stand`` where the start wants it.

    Raises:
        ConversionError: for weights that are not finite.
    """
    for name, parameter in stand.conv.named_parameters(recurse=False):
        if not bool(torch.isfinite(parameter).all()):
            raise ConversionError(f"its {name} holds NaN or infinity")
    # A layer reuses the Parameters it is built from, and a fit may write on them.
    conv = copy.deepcopy(stand.conv)
    layer = build_layer(conv, config, start, site).module.eval()
    if fit_method(config, start) is None or not isinstance(layer, OperatorLayer):
        return New(layer, {stand.conv: layer})
    # What a neutral start leaves to a BatchNorm it can hold itself.
    norm = None if start.name == "neutral" else _norm(twin, site)
    fitter = layer.fitter(stand.conv, start.value if start.name == "fit" else None, shift=norm is not None)
    if fitter is None:
        return New(layer, {stand.conv: layer})
    while True:
        for x, y in itertools.chain.from_iterable(stand.calls):
            size = max(1, _FITTED // max(1, x[0].numel() + y[0].numel()))
            for given, wanted in zip(x.split(size), y.split(size), strict=True):
                fitter.add(given if fitter.local else layer.prepared(given), layer(given), wanted)
        if fitter.finish() is not None:
            break
    if norm is None or fitter.shift is None:
        return New(layer, {stand.conv: layer})
    # It normalises y − μ: adding to y is taking away from μ.
    other = copy.deepcopy(norm)
    other.running_mean.sub_(fitter.shift.to(other.running_mean))
    return New(layer, {stand.conv: layer, norm: other}, fitter.shift)


def _norm(twin: nn.Module, site: Site) -> Any:
    """The BatchNorm that can take an offset that a layer without bias cannot hold, as after ``convert``; or None."""
    if site.geometry.bias or site.batchnorm is None:
        return None
    norm = twin.get_submodule(site.batchnorm)
    return norm if can_absorb(norm) else None


@dataclass(frozen=True)
class Damage:
    """Relative error at the layer's output, mean KL in nats, the share of answers kept (None where keeping them says
    nothing), and the share of right answers, where labels are known."""

    error: float
    kl: float
    agreement: float | None
    top1: float | None


def measure(way: Walk, stand: Stand, new: New, answers: Answers) -> Damage:
    """What the model answers with ``new`` in the place of the convolution."""
    moments, kl, kept, right = Moments(), 0.0, 0, 0
    with _swapped(way.root, new.modules):
        for number, calls in enumerate(stand.calls):
            output: Tensor | None = None
            for x, y in calls:
                out = new.layer(x)
                _add(moments, out, y)
                if stand.known:
                    # A layer that gives its input back must not hand it to what works in place.
                    output = out.clone() if out.data_ptr() == x.data_ptr() else out
            logits = way.answer(number, stand, output)
            finite = torch.isfinite(logits).all(dim=1)
            top = logits.argmax(dim=1)
            kept += int((finite & (top == answers.tops[number])).sum())
            if answers.labels is not None:
                right += int((finite & (top == answers.labels[number])).sum())
            if bool(finite.all()):
                log = F.log_softmax(logits.double(), dim=1)
                kl += float(F.kl_div(log, answers.logs[number], reduction="sum", log_target=True))
            else:
                kl = math.inf
    error = moments.error(1.0, 0.0 if new.offset is None else new.offset)
    return Damage(
        error if math.isfinite(error) else math.inf,
        # Of scores that are alike up to rounding the sum may fall below 0.
        max(kl, 0.0) / answers.images,
        kept / answers.images if answers.refused is None else None,
        right / answers.images if answers.labels is not None else None,
    )


def _add(moments: Moments, x: Tensor, y: Tensor) -> None:
    """The batch in parts."""
    step = max(1, _CHUNK * len(x) // max(1, x.numel()))
    for a, b in zip(x.split(step), y.split(step), strict=True):
        moments.add(a, b)


def saved_ms(stand: Stand, new: New) -> float:
    """Milliseconds per image that a few images take less than with the convolution; medians of calls in turn."""
    # Of the first batch: the time for one image hardly depends on how many there are.
    inputs = [x[:_TIMED] for x, _ in stand.calls[0]]
    taken: tuple[list[float], list[float]] = ([], [])
    # Small layers are measured more often; both have run on these images before.
    while len(taken[0]) < 3 or (len(taken[0]) < 9 and sum(map(sum, taken)) < 3e-3):
        for seconds, layer in zip(taken, (stand.conv, new.layer), strict=True):
            seconds.append(_seconds(layer, inputs))
    old, latest = (statistics.median(seconds) for seconds in taken)
    return 1000 * (old - latest) / len(inputs[0])


def _seconds(layer: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> float:
    begun = now(inputs[0])
    for x in inputs:
        layer(x)
    return now(inputs[0]) - begun
