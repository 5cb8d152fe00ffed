"""A user's own pattern, given as a small module or function, and where it occurs."""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from convsurgery.errors import RuleError
from convsurgery.graph.patterns import Found, Matcher, Miss, single_cut
from convsurgery.graph.tracing import trace
from convsurgery.graph.view import View, same_function

__all__ = ["Template", "template_matcher"]

_COMMUTATIVE = (operator.add, operator.mul)


class Template:
    """A structural pattern made from code: layers of these classes, connected this way.

    Of a module the classes of its layers count and not their options (``Conv2d(3, 8, 3)`` stands for every Conv2d;
    narrow by tests, ``k=3``). In a function the first argument is the tensor, and every further one stands for a layer
    of the class it is annotated with. Functions and numbers must agree; ``a + b``, ``torch.add`` and ``a += b`` are
    one, so are ``F.relu`` and ``x.relu_()``, and the order of the terms of a sum or product is free.

    Args:
        code: an ``nn.Module``, or a function such as ``lambda``-free ``def gated(x, conv: nn.Conv2d): ...``.
        name: for printing; the class's or function's name by default.

    Raises:
        RuleError: when the code does not trace (naming the line), takes or returns several tensors, or has no Conv2d.
    """

    def __init__(self, code: nn.Module | Callable[..., Any], name: str | None = None) -> None:
        self.name = name or (type(code).__name__ if isinstance(code, nn.Module) else code.__name__)
        self.modules: dict[str, nn.Module] = {}
        self.kinds: dict[str, type[nn.Module]] = {}
        if isinstance(code, nn.Module):
            self.modules = dict(code.named_modules(remove_duplicate=False))
        else:
            self.kinds = _annotated(code, str(self))
        self.graph = self._trace(code)
        self._check()

    def __str__(self) -> str:
        return f"<{self.name.strip('<>')}>"

    def _trace(self, code: Any) -> fx.Graph:
        try:
            return trace(code)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuleError(f"the pattern {self} does not trace{_line(error, code)}: {reason}") from error

    def _check(self) -> None:
        inputs = [node for node in self.graph.nodes if node.op == "placeholder" and node.target not in self.kinds]
        if len(inputs) != 1:
            names = ", ".join(str(node.target) for node in inputs)
            raise RuleError(f"the pattern {self} takes {len(inputs)} tensors ({names}); a pattern has one input")
        if not isinstance(self.output, fx.Node):
            raise RuleError(f"the pattern {self} returns {type(self.output).__name__}; a pattern has one output")
        if not any(issubclass(kind, nn.Conv2d) for kind in self._classes()):
            raise RuleError(f"the pattern {self} has no Conv2d; rules replace convolutions")

    def _classes(self) -> list[type[nn.Module]]:
        called = [self.modules[str(node.target)] for node in self.graph.nodes if node.op == "call_module"]
        return [type(module) for module in called] + list(self.kinds.values())

    @cached_property
    def output(self) -> Any:
        """The node whose value the pattern returns."""
        node = next(node for node in self.graph.nodes if node.op == "output")
        return node.args[0]


def _annotated(function: Callable[..., Any], name: str) -> dict[str, type[nn.Module]]:
    """The layers a pattern function takes behind its tensor, by argument."""
    kinds: dict[str, type[nn.Module]] = {}
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    for parameter in parameters[1:]:
        kind = parameter.annotation
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise RuleError(
                f"the pattern {name}: annotate {parameter.name} with the class of the layer it stands for",
                hint=f"{parameter.name}: nn.Conv2d",
            )
        kinds[parameter.name] = kind
    return kinds


def _line(error: BaseException, code: Any) -> str:
    """Where in the user's own source the tracing stopped."""
    function = type(code).forward if isinstance(code, nn.Module) else code
    file = inspect.getsourcefile(function)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if not frames:
        return ""
    return f" at line {frames[-1].lineno} ({(frames[-1].line or '').strip()})"


def template_matcher(template: Template) -> Matcher:
    """The matcher of a user's pattern."""

    def match(view: View) -> Iterator[Found | Miss]:
        for node in view.nodes:
            bound = _unify(template, view, template.output, node, {})
            if bound is None:
                continue
            found = _cut(template, view, bound)
            if found is not None:
                yield found

    return match


def _cut(template: Template, view: View, bound: dict[fx.Node, Any]) -> Found | Miss | None:
    pairs = [(mine, theirs) for mine, theirs in bound.items() if isinstance(theirs, fx.Node)]
    source = next(theirs for mine, theirs in pairs if mine.op == "placeholder")
    nodes = sorted({theirs for mine, theirs in pairs if mine.op != "placeholder"}, key=lambda n: view.position[n])
    # Identities between the layers of a match belong to it.
    passed = [node for node in view.nodes if view.is_identity(node) and node.all_input_nodes[0] in nodes]
    nodes += [node for node in passed if node.users and all(user in nodes for user in node.users)]
    conv = next((node for node in nodes if view.is_conv(node)), None)
    if conv is None:
        return None
    cut = single_cut(view, sorted(nodes, key=lambda n: view.position[n]), source, bound[template.output])
    return Miss(conv, cut) if isinstance(cut, str) else Found(cut, source)


def _unify(
    template: Template, view: View, mine: Any, theirs: Any, bound: dict[fx.Node, Any]
) -> dict[fx.Node, Any] | None:
    """``bound`` with what makes the template's value ``mine`` the region's ``theirs``, or None."""
    if not isinstance(mine, fx.Node):
        return bound if _same_literal(template, view, mine, theirs, bound) else None
    if not isinstance(theirs, fx.Node):
        return None
    if mine in bound:
        return bound if bound[mine] is theirs else None
    while view.is_identity(theirs) and not _is_identity(template, mine):
        theirs = theirs.all_input_nodes[0]
    if mine.op == "placeholder":
        return {**bound, mine: theirs} if theirs.op != "get_attr" else None
    bound = {**bound, mine: theirs}
    if mine.op == "get_attr":
        return bound if theirs.op == "get_attr" else None
    kind, arguments = _layer(template, mine)
    if kind is not None:
        module = view.module(theirs)
        exact = mine.op == "call_module"
        if module is None or (type(module) is not kind if exact else not isinstance(module, kind)):
            return None
        return _unify_all(template, view, arguments, theirs.args, bound) if not theirs.kwargs else None
    if theirs.op not in ("call_function", "call_method"):
        return None
    if same_function(mine.target) != same_function(theirs.target) or not _same_keywords(mine, theirs):
        return None
    orders = [mine.args]
    if same_function(mine.target) in _COMMUTATIVE and len(mine.args) == 2:
        orders.append(mine.args[::-1])
    return next((b for args in orders if (b := _unify_all(template, view, args, theirs.args, bound)) is not None), None)


def _unify_all(
    template: Template, view: View, mine: tuple[Any, ...], theirs: tuple[Any, ...], bound: dict[fx.Node, Any]
) -> dict[fx.Node, Any] | None:
    if len(mine) != len(theirs):
        return None
    for one, other in zip(mine, theirs, strict=True):
        step = _unify(template, view, one, other, bound)
        if step is None:
            return None
        bound = step
    return bound


def _layer(template: Template, node: fx.Node) -> tuple[type[nn.Module] | None, tuple[Any, ...]]:
    """The class of the layer a template's node calls, and the call's arguments; (None, ()) for functions."""
    if node.op == "call_module":
        return type(template.modules[str(node.target)]), node.args
    if node.op == "call_method" and node.target == "__call__":
        argument = node.args[0]
        assert isinstance(argument, fx.Node)
        return template.kinds[str(argument.target)], node.args[1:]
    return None, ()


def _is_identity(template: Template, node: fx.Node) -> bool:
    return _layer(template, node)[0] is nn.Identity


def _same_keywords(mine: fx.Node, theirs: fx.Node) -> bool:
    # Whether a function works in place does not change what it computes.
    mine_kw, their_kw = ({k: v for k, v in n.kwargs.items() if k != "inplace"} for n in (mine, theirs))
    return mine_kw == their_kw


def _same_literal(template: Template, view: View, mine: Any, theirs: Any, bound: dict[fx.Node, Any]) -> bool:
    if isinstance(mine, tuple | list) and isinstance(theirs, tuple | list) and len(mine) == len(theirs):
        return all(
            not isinstance(one, fx.Node) and _same_literal(template, view, one, other, bound)
            for one, other in zip(mine, theirs, strict=True)
        )
    return type(mine) is type(theirs) and bool(mine == theirs) and not isinstance(mine, torch.Tensor)
