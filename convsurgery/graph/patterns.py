"""The structural patterns that rules name, each a function from a region to the places where it occurs.

A matcher yields, for every place where it might begin, the nodes of a match or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from convsurgery.graph.view import View, is_batchnorm

__all__ = ["PATTERNS", "Found", "Matcher", "Miss", "single_cut"]


@dataclass(frozen=True)
class Found:
    """A cut with one input and one output.

    Attributes:
        nodes: in execution order; the last gives the output.
        source: the node whose value goes in.
        projected: for a residual block, whether convolutions stand in the shortcut.
    """

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    projected: bool = False


@dataclass(frozen=True)
class Miss:
    """Why no match begins at ``node``."""

    node: fx.Node
    reason: str


Matcher = Callable[[View], Iterator[Found | Miss]]


def _conv_bn(view: View) -> Iterator[Found | Miss]:
    for conv in filter(view.is_conv, view.nodes):
        norm = view.next(conv)
        if norm is None:
            yield Miss(conv, view.why_no_next(conv))
        elif not is_batchnorm(view.module(norm)) or not _takes_only(norm):
            yield Miss(conv, f"followed by {view.describe(norm)}, not by a BatchNorm")
        else:
            yield _chain(view, conv, norm)


def _conv_act(view: View) -> Iterator[Found | Miss]:
    for conv in filter(view.is_conv, view.nodes):
        act = view.next(conv)
        if act is None:
            yield Miss(conv, view.why_no_next(conv))
        elif not view.is_activation(act):
            yield Miss(conv, f"followed by {view.describe(act)}, not by an activation")
        else:
            yield _chain(view, conv, act)


def _conv_bn_act(view: View) -> Iterator[Found | Miss]:
    for found in _conv_bn(view):
        if isinstance(found, Miss):
            yield found
            continue
        conv, norm = found.nodes[0], found.nodes[-1]
        if view.has_activation(view.module(norm)):
            yield found
            continue
        act = view.next(norm)
        if act is None:
            yield Miss(conv, f"of its BatchNorm: {view.why_no_next(norm)}")
        elif not view.is_activation(act):
            yield Miss(conv, f"its BatchNorm is followed by {view.describe(act)}, not by an activation")
        else:
            yield _chain(view, conv, act)


def _depthwise_separable(view: View) -> Iterator[Found | Miss]:
    for conv in filter(view.is_conv, view.nodes):
        if not _geometry(view, conv, depthwise=True):
            yield Miss(conv, "not depthwise")
            continue
        last, reason = _next_conv(view, conv)
        if last is None:
            yield Miss(conv, reason)
        elif not _geometry(view, last, depthwise=False):
            yield Miss(conv, f"followed by {view.describe(last)}, which is not a pointwise convolution")
        else:
            yield _chain(view, conv, last)


def _bottleneck(view: View) -> Iterator[Found | Miss]:
    for first in filter(view.is_conv, view.nodes):
        if not _geometry(view, first, depthwise=False):
            yield Miss(first, "not pointwise")
            continue
        middle, reason = _next_conv(view, first)
        if middle is None:
            yield Miss(first, reason)
            continue
        if _kernel(view, middle) == (1, 1):
            yield Miss(first, f"followed by {view.describe(middle)}, which is pointwise too")
            continue
        last, reason = _next_conv(view, middle)
        if last is None:
            yield Miss(first, f"behind {view.describe(middle)}: {reason}")
        elif not _geometry(view, last, depthwise=False):
            yield Miss(first, f"its third convolution {view.describe(last)} is not pointwise")
        else:
            yield _chain(view, first, last)


def _residual(view: View) -> Iterator[Found | Miss]:
    for add in filter(view.is_add, view.nodes):
        left, right = add.all_input_nodes if len(add.all_input_nodes) == 2 else (None, None)
        if left is None or right is None or "get_attr" in (left.op, right.op):
            continue
        found = _shortcut(view, add, left, right)
        if found is not None:
            yield found


def _shortcut(view: View, add: fx.Node, left: fx.Node, right: fx.Node) -> Found | Miss | None:
    common = view.upstream(left) & view.upstream(right)
    shared = [node for node in view.members(common) if node.op != "get_attr"]
    if not shared:
        return None
    source = shared[-1]
    # Everything between the source and the sum, and the parameters it reads.
    before = view.upstream(source)
    inside = view.upstream(add) & ~before
    branches = [view.members(view.upstream(node) & inside & ~(1 << view.position[source])) for node in (left, right)]
    convs = sorted((sum(map(view.holds_conv, branch)), i) for i, branch in enumerate(branches))
    (short, shortcut), (many, _) = convs
    if many == 0:
        return None
    first = next(node for branch in branches for node in branch if view.holds_conv(node))
    if short > 1:
        return Miss(first, "both branches of the sum hold several convolutions: there is no shortcut")
    if short == 1 and many == 1 and not any(view.is_conv(n) and _kernel(view, n) == (1, 1) for n in branches[shortcut]):
        return Miss(first, "both branches of the sum hold a convolution: neither is a shortcut")
    cut = single_cut(view, view.members(inside), source, add)
    if isinstance(cut, str):
        return Miss(first, cut)
    return Found(cut, source, projected=short > 0)


def single_cut(view: View, nodes: list[fx.Node], source: fx.Node, last: fx.Node) -> tuple[fx.Node, ...] | str:
    """``nodes`` in order if they are a cut with one input and one output, else the reason why not."""
    inside = set(nodes)
    for node in nodes:
        if node.op == "placeholder":
            return f"a cut with two inputs: {view.describe(node)} goes in besides {view.describe(source)}"
        for other in node.all_input_nodes:
            if other is not source and other not in inside and other.op != "get_attr":
                return f"a cut with two inputs: {view.describe(node)} also takes {view.describe(other)}"
        for user in node.users:
            if node is not last and user not in inside and node.op != "get_attr":
                return f"a cut with two outputs: {view.describe(user)} also takes {view.describe(node)}"
    # In-place work on the input would be seen outside; work outside on the input would come too early or too late.
    start, end = view.position[nodes[0]], view.position[last]
    outside = [user for user in source.users if user not in inside]
    for node in nodes:
        if view.mutates(node, source) and any(view.position[user] > start for user in outside):
            return f"{view.describe(node)} works in place on the input, which is used outside too"
    for user in outside:
        if start < view.position[user] < end and view.mutates(user, source):
            return f"{view.describe(user)} works in place on the input in between"
    return tuple(sorted(nodes, key=lambda node: view.position[node]))


def _chain(view: View, first: fx.Node, last: fx.Node) -> Found | Miss:
    """Everything from ``first`` to ``last`` along single consumers."""
    nodes = [first]
    while nodes[-1] is not last:
        nodes.append(next(iter(nodes[-1].users)))
    sources = first.all_input_nodes
    if len(sources) != 1:
        return Miss(first, "it takes no single input")
    cut = single_cut(view, nodes, sources[0], last)
    return Miss(first, cut) if isinstance(cut, str) else Found(cut, sources[0])


def _takes_only(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs


def _next_conv(view: View, node: fx.Node) -> tuple[fx.Node | None, str]:
    """The convolution behind ``node`` with nothing but norms, activations and dropout between, or the reason."""
    while True:
        after = view.next(node)
        if after is None:
            return None, view.why_no_next(node)
        if view.is_conv(after):
            return after, ""
        if not view.is_pass(after):
            return None, f"followed by {view.describe(after)}"
        node = after


def _kernel(view: View, node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(view.module(node), "kernel_size", ()))


def _geometry(view: View, node: fx.Node, *, depthwise: bool) -> bool:
    """Whether a convolution is depthwise over a window, or pointwise over all channels."""
    conv = view.module(node)
    groups, channels = getattr(conv, "groups", 1), getattr(conv, "in_channels", 0)
    if depthwise:
        return groups == channels > 1 and _kernel(view, node) != (1, 1)
    return groups == 1 and _kernel(view, node) == (1, 1)


PATTERNS: dict[str, Matcher] = {
    "conv-bn": _conv_bn,
    "conv-bn-act": _conv_bn_act,
    "conv-act": _conv_act,
    "residual": _residual,
    "depthwise-separable": _depthwise_separable,
    "bottleneck": _bottleneck,
}
