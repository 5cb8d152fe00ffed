"""Putting one module in the place of a block: layer by layer where it is a chain, else in its owner's forward.

A rewritten owner becomes an instance of a subclass of its own class whose ``forward`` FX has written from the edited
graph. It keeps its attributes, methods, hooks and state, ``isinstance`` holds, and no other module changes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from convsurgery.adapters import adapter_for
from convsurgery.errors import ConversionError
from convsurgery.geometry import Block
from convsurgery.graph import trace_owner
from convsurgery.operators import Blend, Built, OperatorConfig
from convsurgery.surgery.plan import Entry

__all__ = ["ChainEdit", "OwnerEdit", "chain_edit", "owner_edits", "rewritten"]


@dataclass(frozen=True)
class ChainEdit:
    """The modules that take the places of a chain's members, by name."""

    block: Block
    modules: Mapping[str, nn.Module]


@dataclass(frozen=True)
class OwnerEdit:
    """An owner whose forward is to be rewritten, the modules it gains, and the members that leave it."""

    owner: str
    graph: fx.Graph
    gained: Mapping[str, nn.Module]
    left: tuple[str, ...]


def chain_edit(entry: Entry, modules: Mapping[str, nn.Module]) -> ChainEdit:
    """What a chain turns into: the new module first, then what stays of the last, nothing in between."""
    block, config, start = entry.block, entry.config, entry.start
    assert block is not None
    assert config is not None
    assert start is not None
    layers = _members(block, modules)
    adapter = adapter_for(layers[0]) if len(block.sites) == 1 else None
    if adapter is None:
        built = _built(config, nn.Sequential(*layers), entry)
        new = built.module
    else:
        conv = layers[0]
        assert isinstance(conv, nn.Conv2d)
        plain = adapter.plain(conv)
        built = _built(config, nn.Sequential(plain, *layers[1:]), entry)
        new = adapter.wrap(built.module, conv, plain)
    placed: list[nn.Module] = [new, *(nn.Identity() for _ in layers[1:])]
    if built.rest is not None:
        placed[-1] = built.rest if len(layers) > 1 else nn.Sequential(new, built.rest)
    return ChainEdit(block, dict(zip(block.members, placed, strict=True)))


def _built(config: OperatorConfig, computes: nn.Module, entry: Entry) -> Built:
    """The operator in the block's place, or blended with the block."""
    block, start = entry.block, entry.start
    assert block is not None
    assert start is not None
    if start.name != "blend":
        return config.build_block(computes, block, start)
    built = config.build_block(copy.deepcopy(computes), block, config.blended_start())
    if start.value == 1:
        return built
    new = built.module if built.rest is None else nn.Sequential(built.module, built.rest)
    return Built(Blend(computes, new, start.value or 0.0, site=entry.site.name))


def _members(block: Block, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    found = []
    for name, kind in zip(block.members, block.kinds, strict=True):
        module = modules.get(name)
        if module is None or type(module).__name__ != kind:
            what = "nothing" if module is None else type(module).__name__
            raise ConversionError(f"the plan is for another model: it wants a {kind} at {name}, here is {what}")
        found.append(module)
    return found


def owner_edits(entries: Iterable[Entry], modules: Mapping[str, nn.Module]) -> list[OwnerEdit]:
    """The owners to rewrite, the deepest first; nothing is changed yet."""
    by_owner: dict[str, list[Entry]] = {}
    for entry in entries:
        assert entry.block is not None
        _members(entry.block, modules)
        by_owner.setdefault(entry.block.owner, []).append(entry)
    order = sorted(by_owner, key=lambda owner: owner.count("."), reverse=True)
    return [_owner_edit(owner, by_owner[owner], modules) for owner in order]


def _owner_edit(name: str, entries: Sequence[Entry], modules: Mapping[str, nn.Module]) -> OwnerEdit:
    owner = modules[name]
    opened = entries[0].block.opened if entries[0].block else ()
    try:
        graph = trace_owner(owner, opened)
    except Exception as error:
        raise ConversionError(f"the forward of {name} cannot be rewritten: {error}") from error
    gained: dict[str, nn.Module] = {}
    members: list[str] = []
    for entry in entries:
        block, config, start = entry.block, entry.config, entry.start
        assert block is not None
        assert config is not None
        assert start is not None
        nodes = _nodes(graph, block)
        source, computes = _extract(owner, graph, nodes)
        child = _free_name(owner, block.pattern, gained)
        built = _built(config, computes.train(owner.training), entry)
        gained[child] = built.module if built.rest is None else nn.Sequential(built.module, built.rest)
        last = nodes[-1]
        with graph.inserting_before(last):
            call = graph.call_module(child, (source,))
        last.replace_all_uses_with(call)
        for node in reversed(nodes):
            graph.erase_node(node)
        members += block.own
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
    return OwnerEdit(name, graph, gained, tuple(members))


def _nodes(graph: fx.Graph, block: Block) -> list[fx.Node]:
    by_name = {node.name: node for node in graph.nodes}
    missing = [name for name in block.nodes if name not in by_name]
    nodes = [by_name[name] for name in block.nodes if name in by_name]
    called = dict.fromkeys(f"{block.owner}.{node.target}" for node in nodes if node.op == "call_module")
    if missing or tuple(called) != block.members:
        raise ConversionError(
            f"the plan is for another model: the forward of {block.owner} is not the one it was made for"
        )
    return nodes


def _extract(owner: nn.Module, graph: fx.Graph, nodes: Sequence[fx.Node]) -> tuple[fx.Node, fx.GraphModule]:
    """The node whose value the cut takes, and the cut as a module of its own, made of the same layers."""
    inside = set(nodes)
    outer = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    constants = [node for node in outer if node.op == "get_attr"]
    (source,) = (node for node in outer if node.op != "get_attr")
    cut = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {source: cut.placeholder("input")}
    for node in (*constants, *nodes):
        copies[node] = cut.node_copy(node, lambda old: copies[old])
    cut.output(copies[nodes[-1]])
    return source, fx.GraphModule(owner, cut)


def _free_name(owner: nn.Module, pattern: str, taken: Mapping[str, nn.Module]) -> str:
    base = "".join(c if c.isalnum() else "_" for c in pattern.strip("<>"))
    names = (base if i == 0 else f"{base}_{i}" for i in range(len(taken) + len(owner._modules) + 2))
    return next(name for name in names if name not in taken and not hasattr(owner, name))


class _Rewritten(nn.Module):
    """Base of the subclasses made here."""

    _class: ClassVar[type[nn.Module]]
    #: what ``forward`` was written from
    graph: ClassVar[fx.Graph]
    code: ClassVar[str]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no name to be imported by. A copy shares it; a pickle would have to carry code.
        return _blank, (_Kind(type(self)),), *tuple(super().__reduce_ex__(protocol))[2:]


class _Kind:
    """Carries a class through ``copy.deepcopy``, and refuses to be pickled."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kind:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"a rewritten {self.kind.__name__} cannot be pickled: save the model with convsurgery.save")


def _blank(kind: _Kind) -> nn.Module:
    made: nn.Module = kind.kind.__new__(kind.kind)
    return made


def rewritten(owner: nn.Module, edit: OwnerEdit) -> nn.Module:
    """A twin of ``owner`` that computes what ``edit.graph`` says; it shares the owner's children as they are now."""
    children = {**owner._modules, **edit.gained}
    shell = fx.GraphModule({**_targets(owner, edit)}, edit.graph, class_name=type(owner).__name__)
    kind = type(owner)
    # Rewritten twice: the second forward replaces the first.
    base: type[nn.Module] = kind._class if issubclass(kind, _Rewritten) else kind
    members = {
        "_class": base,
        "graph": edit.graph,
        "code": shell.code,
        "forward": type(shell).forward,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    twin_class: type[nn.Module] = type(base.__name__, (_Rewritten, base), members)
    twin = _blank(_Kind(twin_class))
    twin.__dict__.update(owner.__dict__)
    twin.__dict__["_modules"] = children
    return twin


def _targets(owner: nn.Module, edit: OwnerEdit) -> dict[str, Any]:
    """Everything the graph names, for FX to write code against."""
    found: dict[str, Any] = {}
    for node in edit.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            own = edit.gained.get(target)
            found[target] = own if own is not None else functools.reduce(getattr, target.split("."), owner)
    return found
