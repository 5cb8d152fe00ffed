"""The plan: for every site of a model an edit, or the reason why it stays. Frozen, printable, to JSON and back."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convsurgery.errors import RuleError, StorageError
from convsurgery.geometry import Block, Cost, OtherConv, Site
from convsurgery.operators import OperatorConfig, Start, bind
from convsurgery.plain import from_plain, parse_json
from convsurgery.rules import parse_target

__all__ = ["FORMAT", "Entry", "Plan"]

#: plans of format 1 were written by convsurgery 0.1: neutral meant filters that are scaled. They are read as that.
FORMAT = 2
_SCALED = 1


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
        block: for a structural rule, the block this convolution belongs to. Its first convolution's entry stands for
            the whole block; the others say that they are part of it.
    """

    site: Site
    config: OperatorConfig | None
    start: Start | None
    reason: str | None
    rule: int | None
    after: Cost
    absorb: bool = False
    block: Block | None = None

    @property
    def heads_block(self) -> bool:
        """Whether this entry stands for its whole block."""
        return self.block is not None and self.config is not None

    @property
    def before(self) -> Cost:
        """Cost of what stands there now; of a block it is all at the block's first convolution."""
        if self.block is None:
            return self.site.cost
        return Cost(self.block.params, self.block.macs) if self.heads_block else Cost(0, 0)

    @property
    def exactness(self) -> str:
        """How the start keeps the convolution: "exact", "approximate", "fitted" to data or "none"."""
        return "exact" if self.config is None or self.start is None else self.config.keeps(self.start)


@dataclass(frozen=True)
class Plan:
    """For every site of a model an edit, or the reason why it stays.

    Prints as a table; goes to JSON and back; ``apply(model, plan)`` carries it out.

    Attributes:
        model: the model's name or class, as printed.
        rule: the rules' canonical text.
        seen: how the model was seen: "FX and hooks", or which of the two alone and why.
        input_shapes: of the inputs it was seen with, batch included.
        entries: one for each Conv2d, in execution order.
        total_params: trainable parameters of the whole model before.
        notes: what else there is to say, such as blocks that overlap with others.
        others: convolutions that a forward pass executes and that are no Conv2d of the model, so that no rule can take
            them.
        weights: where the model's weights came from, as far as it is known; "" in plans of earlier versions.
    """

    model: str
    rule: str
    seen: str
    input_shapes: tuple[tuple[int, ...], ...]
    entries: tuple[Entry, ...]
    total_params: int
    notes: tuple[str, ...] = ()
    others: tuple[OtherConv, ...] = ()
    weights: str = ""

    @property
    def executed(self) -> int:
        """How many convolutions one forward pass executes: the calls of all entries, and the others."""
        return sum(entry.site.calls for entry in self.entries) + sum(other.calls for other in self.others)

    @property
    def edits(self) -> tuple[Entry, ...]:
        """The entries that replace a convolution."""
        return tuple(entry for entry in self.entries if entry.config is not None)

    @property
    def skips(self) -> tuple[Entry, ...]:
        """The entries a rule took and that stay all the same, each with its reason."""
        return tuple(
            entry for entry in self.entries if entry.config is None and entry.rule is not None and entry.block is None
        )

    @property
    def before(self) -> Cost:
        """Cost of all called convolutions, and of the blocks that are replaced, together."""
        return _total(entry.before for entry in self.entries)

    @property
    def after(self) -> Cost:
        """The same after the plan is carried out."""
        return _total(entry.after for entry in self.entries)

    def without(self, pattern: str) -> Plan:
        """This plan with the sites whose name matches the glob ``pattern`` left as they are, and blocks around them."""

        def hit(entry: Entry) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for name in entry.site.names)

        blocks = {entry.block for entry in self.entries if entry.block is not None and hit(entry)}
        reason = f"left out by {pattern!r}"
        entries = tuple(
            Entry(entry.site, None, None, reason, entry.rule, entry.site.cost)
            if (entry.config is not None and hit(entry)) or entry.block in blocks
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
                "scaled": entry.start is not None and entry.start.scaled,
                "reason": entry.reason,
                "rule": entry.rule,
                "after": dataclasses.asdict(entry.after),
                "absorb": entry.absorb,
                "block": None if entry.block is None else dataclasses.asdict(entry.block),
            }
            for entry in self.entries
        ]
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["others"] = [dataclasses.asdict(other) for other in self.others]
        result: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **plain, "entries": entries}))
        return result

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan written by :meth:`to_json`.

        Raises:
            StorageError: for anything else, saying what is missing or of the wrong kind.
        """
        return cls.from_dict(parse_json(text, "the plan"))

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Read a plan from what :meth:`to_dict` gives; errors as :meth:`from_json`."""
        if not isinstance(data, Mapping):
            raise StorageError(f"the plan is not what convsurgery writes: {data!r:.80}")
        if "format" not in data:
            raise StorageError("the plan has no 'format'")
        form = data["format"]
        if type(form) is not int or form not in (_SCALED, FORMAT):
            raise StorageError(f"the plan has format {form!r:.80}; this version reads {_SCALED} and {FORMAT}")
        items = data.get("entries")
        if not isinstance(items, list):
            raise StorageError("the plan is not what convsurgery writes: it has no list of 'entries'")
        entries = tuple(
            _entry(item, f"entry {number} of the plan", scaled=form == _SCALED) for number, item in enumerate(items)
        )
        rest = {key: value for key, value in data.items() if key not in ("format", "entries")}
        return dataclasses.replace(from_plain(cls, {**rest, "entries": []}, "the plan"), entries=entries)

    def __str__(self) -> str:
        from convsurgery.surgery.table import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from convsurgery.surgery.table import plan_html

        return plan_html(self)


@dataclass(frozen=True)
class _Written:
    """An entry as it is written: operators and starts as texts."""

    site: Site
    operator: str | None
    start: str | None
    reason: str | None
    rule: int | None
    after: Cost
    absorb: bool
    block: Block | None = None
    scaled: bool = False


def _entry(item: Any, where: str, *, scaled: bool) -> Entry:
    """One entry; ``scaled``: of a plan whose neutral starts all scale their filters."""
    read = from_plain(_Written, item, where)
    if not read.site.names:
        raise StorageError(f"{where}.site has no names")
    if (read.operator is None) != (read.start is None):
        raise StorageError(f"{where} has an operator without a start, or a start without an operator")
    if read.block is not None and not (read.block.sites and read.block.members):
        raise StorageError(f"{where}.block has no sites or no members")
    try:
        config = None if read.operator is None else bind(parse_target(read.operator))
        start = None if read.start is None else Start.parse(read.start)
        if start is not None and start.name == "neutral" and (scaled or read.scaled):
            start = dataclasses.replace(start, scaled=True)
    except RuleError as error:
        raise StorageError(f"{where}: {error}") from error
    if config is not None and start is not None and start.name not in config.starts:
        raise StorageError(f"{where}: {config} has no start {start.name!r}")
    return Entry(read.site, config, start, read.reason, read.rule, read.after, read.absorb, read.block)


def _total(costs: Any) -> Cost:
    costs = list(costs)
    return Cost(sum(cost.params for cost in costs), sum(cost.macs for cost in costs))
