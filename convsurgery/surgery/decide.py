"""Rule × sites × what each operator supports → a frozen plan. Nothing is edited here."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from convsurgery.errors import ArgumentError, ConversionError, NoMatchError, RuleError, nearest
from convsurgery.geometry import Block, Cost, Site
from convsurgery.graph import Candidate, Observation, Template, find_blocks
from convsurgery.operators import Blend, OperatorConfig, Start, bind, list_operators, operator
from convsurgery.rules import (
    BY,
    AutoTarget,
    Glob,
    PatternSelector,
    Rule,
    Rules,
    Selector,
    Target,
    Test,
    failed_tests,
)
from convsurgery.surgery.owners import fold_notes
from convsurgery.surgery.plan import Entry, Plan

__all__ = ["make_plan"]

#: patterns around one convolution: an operator that replaces convolutions can stand in them
_AROUND_ONE = ("conv-bn", "conv-bn-act", "conv-act")


def make_plan(
    model: str, total_params: int, seen: Observation, rules: Rules, start: Start | None = None, *, data: bool = False
) -> Plan:
    """Decide for every site.

    Args:
        model: the model's name, as printed.
        total_params: its trainable parameters.
        seen: its sites and graphs.
        rules: the first rule that takes a site wins; of blocks that overlap, the first in execution order.
        start: for all replacements whose rule names none; None leaves it to each operator.
        data: whether there will be data to fit to.

    Raises:
        RuleError: for operators or arguments that do not exist, patterns that do not trace, and operators that cannot
            stand where the rule puts them.
        NoMatchError: when no rule takes any site.
        ConversionError: when a site that a rule names alone cannot be replaced.
    """
    return _Decision(seen, rules, start, data).plan(model, total_params)


class _Decision:
    def __init__(self, seen: Observation, rules: Rules, start: Start | None, data: bool) -> None:
        self.seen, self.rules, self.data = seen, rules, data
        self.entries: dict[str, Entry] = {}
        self.misses: list[tuple[int, int, str, str]] = []
        self.notes: list[str] = []
        # All rules are bound before any work is done, so that a mistake in the last one is told at once.
        self.configs = [None if rule.keeps else bind(_single_target(rule)) for rule in rules]
        self.wanted = [_wanted(rule, start) for rule in rules]
        self.starts = [
            None if config is None else _start(rule, config, wanted, data)
            for rule, config, wanted in zip(rules, self.configs, self.wanted, strict=True)
        ]
        for rule, config in zip(rules, self.configs, strict=True):
            if config is not None:
                _check_kind(rule, config)

    def plan(self, model: str, total_params: int) -> Plan:
        for number, rule in enumerate(self.rules):
            if rule.selector.structural:
                self._take_blocks(number, rule)
            else:
                self._take_sites(number, rule)
        if not self.entries:
            raise self._no_match()
        entries = tuple(self.entries.get(site.name) or _untaken(site) for site in self.seen.sites)
        seen = self.seen
        notes = (*self.notes, *_untied(entries), *_fallen_away(entries), *_folds(seen, entries))
        return Plan(model, str(self.rules), seen.seen, seen.input_shapes, entries, total_params, notes, seen.others)

    def _take_sites(self, number: int, rule: Rule) -> None:
        config = self.configs[number]
        for site in self.seen.sites:
            if site.name in self.entries:
                continue
            reason = rule.selector.reason(site, self.seen.sites)
            if reason is not None:
                self._miss(site, reason)
            elif config is None:
                self._stays(site, "kept", number)
            else:
                self._replace(site, config, rule, number)

    def _replace(self, site: Site, config: OperatorConfig, rule: Rule, number: int) -> None:
        refusal = site.blocked or _blended(site) or config.refuses(site)
        start = None
        if refusal is None:
            try:
                start = config.start_for(self.wanted[number], site, data=self.data)
            except ArgumentError as error:
                refusal = error.message
        if refusal is not None or start is None:
            if rule.selector.singles_out:
                raise ConversionError(f"{site.label} cannot become {config}: {refusal}")
            self._stays(site, str(refusal), number)
            return
        absorb = (
            config.leaves_gain and start.name == "neutral" and site.batchnorm is not None and not site.geometry.bias
        )
        self.entries[site.name] = Entry(site, config, start, None, number, config.cost(site), absorb)

    def _stays(self, site: Site, reason: str, number: int, block: Block | None = None) -> None:
        after = site.cost if block is None else Cost(0, 0)
        self.entries[site.name] = Entry(site, None, None, reason, number, after, block=block)

    def _take_blocks(self, number: int, rule: Rule) -> None:
        selector = rule.selector
        assert isinstance(selector, Selector | PatternSelector)
        for candidate in find_blocks(self.seen, _pattern(selector)):
            reason = failed_tests(selector.tests, candidate.site)
            if reason is not None or candidate.block is None:
                self._miss(candidate.site, reason or candidate.reason or "")
                continue
            sites = [site for site in self.seen.sites if site.name in candidate.block.sites]
            rival = next((self.entries[site.name] for site in sites if site.name in self.entries), None)
            if rival is not None:
                self._note_overlap(candidate.block, rival)
            else:
                self._take_block(candidate, sites, rule, number)

    def _take_block(self, candidate: Candidate, sites: list[Site], rule: Rule, number: int) -> None:
        config, start, block = self.configs[number], self.starts[number], candidate.block
        assert block is not None
        if config is None or start is None:
            for site in sites:
                self._stays(site, "kept", number)
            return
        if not config.takes():
            if len(sites) != 1:
                raise _several(rule, config)
            self._replace(sites[0], config, rule, number)
            return
        blocked = next((f"{site.label}: {site.blocked}" for site in sites if site.blocked), None)
        refusal = blocked or candidate.reason or config.refuses_block(block, sites) or self._second_view(block)
        if refusal is not None:
            if rule.selector.singles_out:
                raise ConversionError(f"{block.pattern} at {block.label} cannot become {config}: {refusal}")
            for site in sites:
                self._stays(site, refusal, number)
            return
        after = config.block_cost(block, sites)
        self.entries[sites[0].name] = Entry(sites[0], config, start, None, number, after, block=block)
        for site in sites[1:]:
            self._stays(site, f"part of the {block.pattern} at {sites[0].label}", number, block)

    def _second_view(self, block: Block) -> str | None:
        """A forward is rewritten once, from one graph: blocks in it must have been found in that graph."""
        if block.chain:
            return None
        others = [entry.block for entry in self.entries.values() if entry.heads_block]
        rival = next(
            (b for b in others if b and not b.chain and b.owner == block.owner and b.opened != block.opened), 0
        )
        return f"another block of {block.owner} is rewritten already" if rival else None

    def _note_overlap(self, block: Block, rival: Entry) -> None:
        if rival.block is not None and rival.block.members == block.members:
            return
        what = (
            f"the {rival.block.pattern} at {rival.block.label}"
            if rival.block
            else f"the rule that took {rival.site.label}"
        )
        self.notes.append(f"{block.pattern} at {block.label} overlaps with {what}, which comes first")

    def _miss(self, site: Site, reason: str) -> None:
        wishes = reason.count("=") + reason.count(">") + reason.count("<")
        self.misses.append((wishes, site.index, site.label, reason))

    def _no_match(self) -> NoMatchError:
        """The error for rules that take nothing: the nearest misses first (fewest failed wishes)."""
        if not self.seen.sites:
            hint = "what it has instead:\n" + "\n".join(f"  {other}" for other in self.seen.others)
            return NoMatchError("the model has no Conv2d", str(self.rules), hint=hint if self.seen.others else "")
        wanted = [str(test.value) for rule in self.rules for test in _tests(rule) if _names(test)]
        ranked = sorted(self.misses, key=lambda miss: (miss[0], -_likeness(miss[2], wanted), *miss))
        shown = list(dict.fromkeys(f"  {label}: {reason}" for _, _, label, reason in ranked))
        more = [f"  … and {len(shown) - 5} more"] if len(shown) > 5 else []
        hint = "near misses:\n" + "\n".join(shown[:5] + more) if shown else "nothing in the model looks like it"
        structural = all(rule.selector.structural for rule in self.rules)
        if structural and self.seen.seen != "FX and hooks":
            hint += f"\npatterns are found where FX traces; the model was seen by {self.seen.seen}"
        message = "no part of the model matches" if structural else "no convolution matches"
        return NoMatchError(message, str(self.rules), 0, len(str(self.rules)), hint=hint)


def _tests(rule: Rule) -> tuple[Test, ...]:
    return getattr(rule.selector, "tests", ())


def _names(test: Test) -> bool:
    """Whether a test asks for one name."""
    return test.key == "name" and isinstance(test.value, Glob) and test.value.literal


def _likeness(name: str, wanted: Sequence[str]) -> float:
    """How alike a name is to the nearest of those that rules ask for, from 0 to 1."""
    return max((SequenceMatcher(None, name, other).ratio() for other in wanted), default=0.0)


#: starts that take the convolution's own Parameter objects over
_KEEPING = ("neutral", "copy")


def _untied(entries: tuple[Entry, ...]) -> list[str]:
    """Parameters that several modules share, and that an operator with weights of its own parts."""
    said: dict[frozenset[str], str] = {}
    for entry in entries:
        if entry.site.tied and entry.config is not None and entry.start and entry.start.name not in _KEEPING:
            sharing = (entry.site.name, *entry.site.tied)
            said.setdefault(
                frozenset(sharing),
                f"{' and '.join(sharing)} share their filters; as {entry.config} "
                f"{entry.site.label} has weights of its own",
            )
    return list(said.values())


def _fallen_away(entries: tuple[Entry, ...]) -> list[str]:
    """What operators leave out of the convolutions they replace, each said once."""
    said: dict[str, int] = {}
    for entry in entries:
        if entry.config is not None and entry.block is None and (note := entry.config.note(entry.site)):
            said[note] = said.get(note, 0) + 1
    return [f"{note} (at {count} site{'s' * (count > 1)})" for note, count in said.items()]


def _folds(seen: Observation, entries: tuple[Entry, ...]) -> list[str]:
    modules = {} if seen.run is None else dict(seen.run.skeleton.named_modules(remove_duplicate=False))
    return fold_notes(entries, modules)


def _untaken(site: Site) -> Entry:
    reason = "no rule takes it" if site.index >= 0 else "no forward call reaches it"
    return Entry(site, None, None, reason, None, site.cost)


def _pattern(selector: Selector | PatternSelector) -> str | Template:
    if isinstance(selector, Selector):
        return selector.place
    code = selector.code
    return code if isinstance(code, Template) else Template(code)  # type: ignore[arg-type]


def _blended(site: Site) -> str | None:
    """A convolution that is on its way out cannot be replaced as well."""
    return "it is in a blend: finish that first, or convert the original" if Blend.__name__ in site.owners else None


def _single_target(rule: Rule) -> Target:
    if isinstance(rule.target, AutoTarget):
        raise rule.target.error(
            "auto chooses by measurement, which takes a model with weights, and images",
            hint="convert(model, rule, calibration=images), or on the command line --dataset or --data-dir",
        )
    return rule.target


def _wanted(rule: Rule, start: Start | None) -> Start | None:
    """The start that the rule itself names, else the one for all."""
    if not rule.target.by:
        return start
    if rule.keeps:
        raise rule.target.error("what is kept does not start", BY)
    try:
        return Start.parse(rule.target.by)
    except ArgumentError as error:
        raise rule.target.error(error.message, BY, error.hint) from None


def _start(rule: Rule, config: OperatorConfig, wanted: Start | None, data: bool) -> Start:
    try:
        return config.start_for(wanted, data=data)
    except ArgumentError as error:
        raise rule.target.error(error.message, BY if rule.target.by else None, error.hint) from None


def _check_kind(rule: Rule, config: OperatorConfig) -> None:
    """Whether the operator replaces what the selector names: one convolution, or a block."""
    selector = rule.selector
    if not selector.structural:
        if config.takes():
            patterns = [p for p in config.takes() if p != "*"] or ["residual"]
            raise rule.target.error(
                f"{config.name} takes the place of several layers, and {selector} names single convolutions",
                hint=f"write {patterns[0]}->{config}",
            )
        return
    name = selector.place if isinstance(selector, Selector) else ""
    if not config.takes():
        if name and name not in _AROUND_ONE:
            raise _several(rule, config)
    elif "*" not in config.takes() and name not in config.takes():
        taken = " and ".join(config.takes())
        raise rule.target.error(f"{config.name} takes the place of {taken}, not of {selector}", hint=_takers(name))


def _several(rule: Rule, config: OperatorConfig) -> RuleError:
    return rule.target.error(
        f"{config.name} takes the place of one convolution, and {rule.selector} has several",
        hint=f"name the convolutions, e.g. conv[in=Bottleneck]->{config}",
    )


def _takers(pattern: str) -> str:
    """Which operators could stand there."""
    names = [name for name in list_operators() if {"*", pattern} & set(operator(name).patterns)]
    return f"for {pattern or 'this pattern'}: {', '.join(names)}" if names else nearest(pattern, list_operators())
