"""A plan as a table for the terminal, 80 columns wide, and as HTML for notebooks."""

from __future__ import annotations

import html
import io
from typing import TYPE_CHECKING

from convsurgery.geometry import Site

if TYPE_CHECKING:
    from convsurgery.surgery.plan import Entry, Plan

__all__ = ["count", "plan_html", "plan_text", "render"]

WIDTH = 80


def count(number: float) -> str:
    """A number in three digits with k, M, G or T.

    >>> count(9408), count(118013952)
    ('9.41k', '118M')
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:g}"


def _change(before: int, after: int) -> str:
    old, new = count(before), count(after)
    return old if old == new else f"{old} → {new}"


def _shape(site: Site) -> str:
    if site.index < 0:
        return "never called"
    if site.input_shape is None:
        return "size unknown"
    height, width = site.input_shape[-2:]
    size = f"{height}²" if height == width else f"{height}x{width}"
    return size if site.calls == 1 else f"{size} ×{site.calls}"


def _rows(plan: Plan) -> list[tuple[str, str, str, str, str, str]]:
    """Index, site, convolution, what it becomes, parameters, MACs; unmatched sites are left to the caption."""
    rows = []
    several = _several_starts(plan)
    for entry in plan.entries:
        if entry.rule is None or (entry.block is not None and not entry.heads_block):
            continue
        site = entry.site
        # A space before the arguments gives the terminal a place to break the line.
        becomes = f"stays: {entry.reason}" if entry.config is None else str(entry.config).replace("(", " (")
        if str(entry.config) in several:
            becomes += f" by {entry.start}"
        if len(site.names) > 1:
            becomes += f" (also {', '.join(site.names[1:])})"
        rows.append(
            (
                "–" if site.index < 0 else str(site.index),
                _where(entry),
                _what(entry),
                becomes,
                _change(entry.before.params, entry.after.params),
                _change(entry.before.macs, entry.after.macs),
            )
        )
    return rows


def _several_starts(plan: Plan) -> set[str]:
    """Operators that begin in different ways at different sites; of the others the caption says how."""
    starts: dict[str, set[str]] = {}
    for entry in plan.edits:
        starts.setdefault(str(entry.config), set()).add(str(entry.start))
    return {operator for operator, found in starts.items() if len(found) > 1}


def _where(entry: Entry) -> str:
    """The first convolution's name, or the module that holds a block which is no mere chain."""
    return entry.site.label if entry.block is None or entry.block.chain else entry.block.owner


def _what(entry: Entry) -> str:
    if entry.block is None:
        return f"{entry.site.geometry}, {_shape(entry.site)}"
    convs = len(entry.block.sites)
    inside = str(entry.site.geometry) if convs == 1 else f"{convs} convolutions"
    return f"{entry.block.pattern}: {inside}, {_shape(entry.site)}"


_KEEPS = {
    "exact": "computes what {} did",
    "approximate": "computes nearly what {} did",
    "fitted": "comes as near to what {} did as the data allow",
    "none": "loses the predictions until it is trained",
}


def _starts(plan: Plan) -> list[str]:
    """One line for each start in use: how it keeps the convolution, and who takes over its gain."""
    lines = []
    for start in dict.fromkeys(str(entry.start) for entry in plan.edits):
        group = [entry for entry in plan.edits if str(entry.start) == start]
        for kept in dict.fromkeys(entry.exactness for entry in group):
            some = [entry for entry in group if entry.exactness == kept]
            names = ", ".join(dict.fromkeys(entry.config.name for entry in some if entry.config))
            what = "the convolution" if any(entry.block is None for entry in some) else "the layers"
            line = f"{names} by {start} {_KEEPS[kept].format(what)}"
            if start.startswith("blend"):
                line += " at t = 0"
            absorbed = [entry.site.batchnorm for entry in some if entry.absorb]
            if absorbed:
                who = str(absorbed[0]) if len(absorbed) == 1 else f"the BatchNorm behind it, at {len(absorbed)} sites"
                line += f"; its gain goes into {who}"
            lines.append(line)
    return lines


def _caption(plan: Plan) -> tuple[str, str]:
    # Without the batch; single images have none.
    shape = ", ".join("x".join(map(str, shape[1:] if len(shape) > 3 else shape)) for shape in plan.input_shapes)
    blocks = [entry.block for entry in plan.edits if entry.block is not None]
    inside = sum(len(block.sites) for block in blocks)
    replaced = len(plan.edits) - len(blocks) + inside
    head = f"{plan.model} at {shape}: {replaced} of {len(plan.entries)} convolutions are replaced"
    if blocks:
        head += f", {inside} of them in {len(blocks)} block{'s' * (len(blocks) > 1)}"
    others = sum(other.calls for other in plan.others)
    if others:
        head += f", {others} more {'is' if others == 1 else 'are'} no Conv2d"
    untaken = [entry for entry in plan.entries if entry.rule is None]
    unreached = sum(entry.site.index < 0 for entry in untaken)
    if len(untaken) > unreached:
        head += f", {len(untaken) - unreached} taken by no rule"
    if unreached:
        head += f", {unreached} never called"
    before, after = plan.before, plan.after
    total = plan.total_params
    change = _change(total, total + after.params - before.params)
    foot = f"parameters {change} · MACs in convolutions {_change(before.macs, after.macs)}"
    weights = [f"weights: {plan.weights}"] if plan.weights else []
    said = [*_starts(plan), *_notes(plan), *map(str, plan.others), *weights]
    return head, "\n".join([*said, f"seen by {plan.seen}", foot])


def _notes(plan: Plan, most: int = 3) -> list[str]:
    more = len(plan.notes) - most
    return [*plan.notes[:most], *([f"… and {more} more such"] if more > 0 else [])]


_COLUMNS = ("#", "site", "convolution", "becomes", "params", "MACs")


def plan_text(plan: Plan, width: int = WIDTH) -> str:
    from rich import box
    from rich.table import Table

    head, foot = _caption(plan)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in _COLUMNS:
        number = name in ("#", "params", "MACs")
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in _rows(plan):
        table.add_row(*row)
    return render(head, table, foot, width=width)


def render(*parts: object, width: int = WIDTH) -> str:
    """Rich renderables as plain text of the given width."""
    from rich.console import Console
    from rich.text import Text

    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, legacy_windows=False, markup=False, highlight=False)
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def plan_html(plan: Plan) -> str:
    head, foot = _caption(plan)

    def cells(tag: str, values: tuple[str, ...]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = "".join(cells("td", row) for row in _rows(plan))
    return (
        f"<p>{html.escape(head)}</p><table><thead>{cells('th', _COLUMNS)}</thead><tbody>{body}</tbody></table>"
        + "".join(f"<p>{html.escape(line)}</p>" for line in foot.splitlines())
    )
