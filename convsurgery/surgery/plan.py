"""Rule × sites × what each operator supports → a frozen plan. Nothing is edited here."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convsurgery.errors import ArgumentError, ConversionError, NoMatchError, RuleError, StorageError
from convsurgery.geometry import ConvGeometry, Cost, Site
from convsurgery.graph import Observation
from convsurgery.operators import OperatorConfig, Start, bind
from convsurgery.rules import Rule, Rules, parse_target

__all__ = ["FORMAT", "Entry", "Plan", "make_plan"]

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """What happens at one site.

    Attributes:
        site: where.
        config: the operator that takes the convolution's place, or None when it stays.
        start: how the operator begins; None when the convolution stays.
        reason: why it stays; None for a replacement.
        rule: position of the rule that took the site, from 0; None when no rule did.
        after: cost of what stands there afterwards.
        absorb: whether the BatchNorm behind takes over the operator's per-channel gain.
    """

    site: Site
    config: OperatorConfig | None
    start: Start | None
    reason: str | None
    rule: int | None
    after: Cost
    absorb: bool = False

    @property
    def exactness(self) -> str:
        """How the start keeps the convolution: "exact", "approximate" or "none"."""
        return "exact" if self.config is None or self.start is None else self.config.starts[self.start.name]


@dataclass(frozen=True)
class Plan:
    """For every site of a model an edit, or the reason why it stays.

    Prints as a table; goes to JSON and back; ``apply(model, plan)`` carries it out.

    Attributes:
        model: the model's name or class, as printed.
        rule: the rules' canonical text.
        seen: how the model was seen: "FX and hooks", or "hooks alone (reason)".
        input_shapes: of the inputs it was seen with, batch included.
        entries: one for each Conv2d, in execution order.
        total_params: trainable parameters of the whole model before.
    """

    model: str
    rule: str
    seen: str
    input_shapes: tuple[tuple[int, ...], ...]
    entries: tuple[Entry, ...]
    total_params: int

    @property
    def edits(self) -> tuple[Entry, ...]:
        """The entries that replace a convolution."""
        return tuple(entry for entry in self.entries if entry.config is not None)

    @property
    def skips(self) -> tuple[Entry, ...]:
        """The entries a rule took and that stay all the same, each with its reason."""
        return tuple(entry for entry in self.entries if entry.config is None and entry.rule is not None)

    @property
    def before(self) -> Cost:
        """Cost of all called convolutions together."""
        return _total(entry.site.cost for entry in self.entries)

    @property
    def after(self) -> Cost:
        """The same after the plan is carried out."""
        return _total(entry.after for entry in self.entries)

    def without(self, pattern: str) -> Plan:
        """This plan with the sites whose name matches the glob ``pattern`` left as they are."""
        entries = tuple(
            dataclasses.replace(
                entry, config=None, start=None, reason=f"left out by {pattern!r}", after=entry.site.cost, absorb=False
            )
            if entry.config is not None and any(fnmatch.fnmatchcase(name, pattern) for name in entry.site.names)
            else entry
            for entry in self.entries
        )
        return dataclasses.replace(self, entries=entries)

    def to_json(self, indent: int | None = None) -> str:
        """The plan as a JSON text that :meth:`from_json` reads back to an equal plan."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain lists, dicts, texts and numbers."""
        entries = [
            {
                "site": dataclasses.asdict(entry.site),
                "operator": None if entry.config is None else str(entry.config),
                "start": None if entry.start is None else str(entry.start),
                "reason": entry.reason,
                "rule": entry.rule,
                "after": dataclasses.asdict(entry.after),
                "absorb": entry.absorb,
            }
            for entry in self.entries
        ]
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        result: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **plain, "entries": entries}))
        return result

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan written by :meth:`to_json`.

        Raises:
            StorageError: for anything else, saying what is missing or of the wrong kind.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise StorageError(f"the plan is not JSON: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Read a plan from what :meth:`to_dict` gives; errors as :meth:`from_json`."""
        try:
            if data["format"] != FORMAT:
                raise StorageError(f"the plan has format {data['format']!r}; this version reads {FORMAT}")
            entries = tuple(_entry(item) for item in data["entries"])
            shapes = tuple(tuple(int(n) for n in shape) for shape in data["input_shapes"])
            return cls(data["model"], data["rule"], data["seen"], shapes, entries, int(data["total_params"]))
        except KeyError as error:
            raise StorageError(f"the plan has no {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, RuleError):
                raise
            raise StorageError(f"the plan is not what convsurgery writes: {error}") from error

    def __str__(self) -> str:
        from convsurgery.surgery.table import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from convsurgery.surgery.table import plan_html

        return plan_html(self)


def _entry(item: dict[str, Any]) -> Entry:
    site_fields: dict[str, Any] = _tuples(item["site"])
    geometry_fields: dict[str, Any] = _tuples(site_fields.pop("geometry"))
    site = Site(geometry=ConvGeometry(**geometry_fields), **site_fields)
    config = None if item["operator"] is None else bind(parse_target(item["operator"]))
    start = None if item["start"] is None else Start.parse(item["start"])
    return Entry(site, config, start, item["reason"], item["rule"], Cost(**item["after"]), bool(item["absorb"]))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _total(costs: Any) -> Cost:
    costs = list(costs)
    return Cost(sum(cost.params for cost in costs), sum(cost.macs for cost in costs))


def make_plan(model: str, total_params: int, seen: Observation, rules: Rules, start: Start | None = None) -> Plan:
    """Decide for every site.

    Args:
        model: the model's name, as printed.
        total_params: its trainable parameters.
        seen: its sites.
        rules: the first rule that takes a site wins.
        start: for all replacements; None leaves it to each operator.

    Raises:
        RuleError: for operators or arguments that do not exist.
        NoMatchError: when no rule takes any site.
        ConversionError: when a site that a rule names alone cannot be replaced.
    """
    for rule in rules:
        if rule.selector.structural:
            place = rule.selector
            raise place.error(f"no matcher for the pattern {place} is registered", hint="use a place such as conv")
    configs = [None if rule.keeps else bind(rule.target) for rule in rules]
    starts = [
        None if config is None else _start(rule, config, start) for rule, config in zip(rules, configs, strict=True)
    ]
    entries = []
    for site in seen.sites:
        number = next((i for i, rule in enumerate(rules) if rule.selector.reason(site, seen.sites) is None), None)
        if number is None:
            reason = "no rule takes it" if site.index >= 0 else "no forward call reaches it"
            entries.append(Entry(site, None, None, reason, None, site.cost))
            continue
        rule, config = rules.rules[number], configs[number]
        if config is None:
            entries.append(Entry(site, None, None, "kept", number, site.cost))
            continue
        refusal = site.blocked or config.refuses(site)
        if refusal is not None:
            if rule.selector.singles_out:
                raise ConversionError(f"{site.label} cannot become {config}: {refusal}")
            entries.append(Entry(site, None, None, refusal, number, site.cost))
            continue
        begin = starts[number]
        assert begin is not None
        absorb = begin.name == "neutral" and site.batchnorm is not None and not site.geometry.bias
        entries.append(Entry(site, config, begin, None, number, config.cost(site), absorb))
    if all(entry.rule is None for entry in entries):
        raise _no_match(rules, seen.sites)
    return Plan(model, str(rules), seen.seen, seen.input_shapes, tuple(entries), total_params)


def _start(rule: Rule, config: OperatorConfig, wanted: Start | None) -> Start:
    try:
        return config.start_for(wanted)
    except ArgumentError as error:
        raise rule.target.error(error.message, hint=error.hint) from None


def _no_match(rules: Rules, sites: Sequence[Site]) -> NoMatchError:
    """The error for rules that take nothing: the nearest misses first (fewest failed wishes)."""
    if not sites:
        return NoMatchError("the model has no Conv2d", str(rules))
    misses = []
    for rule in rules:
        for site in sites:
            reason = rule.selector.reason(site, sites) or ""
            misses.append((reason.count("=") + reason.count(">") + reason.count("<"), site.index, site.label, reason))
    shown = list(dict.fromkeys(f"  {label}: {reason}" for _, _, label, reason in sorted(misses)))
    more = [f"  … and {len(shown) - 5} more"] if len(shown) > 5 else []
    hint = "near misses:\n" + "\n".join(shown[:5] + more)
    return NoMatchError("no convolution matches", str(rules), 0, len(str(rules)), hint=hint)
