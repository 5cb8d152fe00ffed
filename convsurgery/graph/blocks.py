"""From matches in a graph to blocks that can be replaced: where each lives, and whether its owner can be rewritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx, nn

from convsurgery.errors import RuleError
from convsurgery.geometry import Block, Site
from convsurgery.graph.instance import own_method
from convsurgery.graph.patterns import PATTERNS, Found, Matcher, Miss
from convsurgery.graph.sites import Observation, aliases
from convsurgery.graph.templates import Template, template_matcher
from convsurgery.graph.tracing import Region, trace_owner
from convsurgery.graph.view import View

__all__ = ["Candidate", "find_blocks"]


@dataclass(frozen=True)
class Candidate:
    """A place where a pattern begins.

    Attributes:
        site: its first convolution.
        block: the block found there, or None.
        reason: why there is no block, or why the block cannot be replaced; None for one that can.
    """

    site: Site
    block: Block | None
    reason: str | None


def find_blocks(seen: Observation, pattern: str | Template) -> list[Candidate]:
    """Every place where ``pattern`` begins, in execution order.

    Args:
        seen: an observed model.
        pattern: a name, one of those that rules know, or a user's template.
    """
    if seen.run is None:
        return []
    if isinstance(pattern, str) and pattern not in PATTERNS:
        raise RuleError(
            f"{pattern} is registered as a pattern of several layers, and nothing finds it",
            hint="give the layers as code: cs.pattern(code)",
        )
    matcher = PATTERNS[pattern] if isinstance(pattern, str) else template_matcher(pattern)
    name = pattern if isinstance(pattern, str) else str(pattern)
    return _Finder(seen, name, matcher).find()


class _Finder:
    def __init__(self, seen: Observation, name: str, matcher: Matcher) -> None:
        assert seen.run is not None
        self.seen, self.run, self.pattern, self.matcher = seen, seen.run, name, matcher
        self.modules = dict(self.run.skeleton.named_modules(remove_duplicate=False))
        self.names = aliases(self.run.skeleton)
        self.sites = {alias: site for site in seen.sites for alias in site.names}
        self.uses = Counter(
            id(self.modules[region.absolute(node.target)])
            for region in seen.regions
            for node in region.graph.nodes
            if node.op == "call_module"
        )
        self.graphs: dict[tuple[str, tuple[str, ...], bool], View | str] = {}

    def find(self) -> list[Candidate]:
        found: dict[tuple[str, ...], Candidate] = {}
        for region in self.seen.regions:
            view = View(region, self.modules)
            for item in self.matcher(view):
                candidate = self._miss(view, item) if isinstance(item, Miss) else self._candidate(view, item)
                if candidate is not None and candidate.site.index >= 0:
                    key = candidate.block.members if candidate.block else (candidate.site.name, candidate.reason or "")
                    found.setdefault(key, candidate)
        # Of blocks that begin at the same convolution the smaller comes first.
        return sorted(found.values(), key=lambda c: (c.site.index, len(c.block.members) if c.block else 0))

    def _miss(self, view: View, miss: Miss) -> Candidate | None:
        sites = self._sites_of(view, [miss.node])
        return Candidate(sites[0], None, miss.reason) if sites else None

    def _sites_of(self, view: View, nodes: Sequence[fx.Node]) -> list[Site]:
        found = {}
        for node in nodes:
            module = view.module(node)
            for below, part in module.named_modules() if module is not None else ():
                if isinstance(part, nn.Conv2d):
                    site = self.sites[".".join(filter(None, (view.name(node), below)))]
                    found[site.name] = site
        return sorted(found.values(), key=lambda site: site.index)

    def _candidate(self, view: View, found: Found) -> Candidate | None:
        sites = self._sites_of(view, found.nodes)
        called = [site for site in sites if site.index >= 0]
        if not called:
            return None
        first = called[0]
        repeated = next((site for site in sites if site.calls > 1), None)
        if repeated is not None:
            return Candidate(first, None, f"{repeated.label} is called {repeated.calls} times")
        members = tuple(dict.fromkeys(view.name(node) for node in found.nodes if node.op == "call_module"))
        owner, opened = self._owner(view, found.nodes)
        chain = self._is_chain(view, found.nodes)
        inside = Counter(view.name(node) for node in found.nodes if node.op == "call_module")
        single = (member for member in members if len(self.names[id(self.modules[member])]) == 1)
        own = tuple(member for member in single if self.uses[id(self.modules[member])] == inside[member])
        parameters = {id(p): p for member in members for p in self.modules[member].parameters()}
        block = Block(
            self.pattern,
            owner,
            tuple(site.name for site in sites),
            members,
            tuple(type(self.modules[member]).__name__ for member in members),
            own,
            chain,
            opened=opened,
            input_shape=first.input_shape,
            output_shape=called[-1].output_shape,
            projected=found.projected,
            params=sum(p.numel() for p in parameters.values()),
            macs=sum(site.cost.macs for site in sites),
        )
        nodes = self._again(block)
        if isinstance(nodes, str):
            return Candidate(first, block, nodes)
        hooked = next((member for member in members if _has_hooks(self.modules[member])), None)
        if hooked is not None:
            return Candidate(first, block, f"{hooked} carries hooks; remove them, convert, and register them again")
        changed = next((f"{name}: its {what}" for name, what in self._own_methods(members, owner, opened)), None)
        if changed is not None:
            return Candidate(first, block, f"{changed} was replaced on this instance")
        if chain:
            return Candidate(first, block, None)
        fields = {**vars(block), "nodes": nodes}
        return Candidate(first, Block(**fields), self._why_not_rewritten(owner))

    def _own_methods(self, members: Sequence[str], owner: str, opened: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Modules of a block, and those whose forward would be rewritten, that have a method of their own."""
        parts = [(name, part) for name in members for part in self.modules[name].modules()]
        around = [(name, self.modules[name]) for name in (owner, *(f"{owner}.{o}" if owner else o for o in opened))]
        for name, module in (*parts, *around):
            what = own_method(module)
            if what is not None:
                yield name or "the model", what

    def _owner(self, view: View, nodes: Sequence[fx.Node]) -> tuple[str, tuple[str, ...]]:
        """The smallest module whose forward runs all nodes, and the modules below it that the nodes lie in."""
        homes = []
        for node in nodes:
            if node.op == "get_attr":
                continue
            stack = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
            if node.op == "call_module":
                stack = stack[:-1]
            homes.append([path for path in stack if path])
        depth = 0
        while all(len(home) > depth for home in homes) and len({home[depth] for home in homes}) == 1:
            depth += 1
        # Containers such as Sequential's slots have no forward of their own to run two modules.
        owner = homes[0][depth - 1] if depth else ""
        opened = dict.fromkeys(path for home in homes for path in home[depth:])
        prefix = f"{owner}." if owner else ""
        return view.region.absolute(owner) if owner else view.region.name, tuple(
            path.removeprefix(prefix) for path in opened
        )

    def _is_chain(self, view: View, nodes: Sequence[fx.Node]) -> bool:
        previous = None
        for node in nodes:
            module = view.module(node)
            if module is None or self.uses[id(module)] != 1 or len(self.names[id(module)]) != 1:
                return False
            if len(node.args) != 1 or node.kwargs or (previous is not None and node.args[0] is not previous):
                return False
            previous = node
        return True

    def _again(self, block: Block) -> tuple[str, ...] | str:
        """Node names in the owner's own graph, where the match must be found in eval and in train mode alike."""
        views = [self._graph(block.owner, block.opened, training) for training in (False, True)]
        codes: list[str] = []
        found: list[tuple[str, ...]] = []
        for view in views:
            if isinstance(view, str):
                return view
            codes.append(_code(view))
            match = next((f for f in self._founds(view) if self._members(view, f) == block.members), None)
            if match is None:
                where = block.owner or "the model"
                return f"in training {where} computes something else here" if found else f"{where} hides part of it"
            found.append(tuple(node.name for node in match.nodes))
        if not block.chain and codes[0] != codes[1]:
            return f"the forward of {block.owner or 'the model'} differs between training and evaluation"
        return found[0]

    def _founds(self, view: View) -> list[Found]:
        return [item for item in self.matcher(view) if isinstance(item, Found)]

    def _members(self, view: View, found: Found) -> tuple[str, ...]:
        return tuple(dict.fromkeys(view.name(node) for node in found.nodes if node.op == "call_module"))

    def _graph(self, owner: str, opened: tuple[str, ...], training: bool) -> View | str:
        key = (owner, opened, training)
        if key not in self.graphs:
            module = self.modules[owner]
            modes = [(part, part.training) for part in module.modules()]
            try:
                module.train(training)
                with self.run.context:
                    self.graphs[key] = View(Region(owner, trace_owner(module, opened)), self.modules)
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.graphs[key] = f"FX does not trace {owner or 'the model'}: {reason}"
            finally:
                for part, mode in modes:
                    part.training = mode
        return self.graphs[key]

    def _why_not_rewritten(self, owner: str) -> str | None:
        if not owner:
            return "its layers belong to the model's own forward, and rewriting that would change the model's class"
        module = self.modules[owner]
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            return f"{owner} is a {type(module).__name__}, which other code may index"
        return None


def _has_hooks(module: nn.Module) -> bool:
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
    )


def _code(view: View) -> str:
    return "\n".join(node.format_node() or node.name for node in view.nodes)
