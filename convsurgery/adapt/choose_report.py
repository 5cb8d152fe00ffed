"""A choice of operators: what it holds, prints and draws."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from convsurgery.errors import ArgumentError, ConvSurgeryError, RuleError, StorageError
from convsurgery.files import output_folder, writing
from convsurgery.rules import Glob, Regex, Selector, Test, Wish

if TYPE_CHECKING:
    from convsurgery.adapt.scan import Scan, ScanRow

__all__ = ["Choice", "Pick", "Point", "Prediction", "change", "choice_text", "draw_trade_off", "unreachable_text"]

_NAMES = {"params": "parameters", "macs": "MACs", "latency": "latency", "agreement": "agreement", "kl": "KL, nats"}
_SHOWN = 5


@dataclass(frozen=True)
class Prediction:
    """What replacements should do to the whole model, if their effects add up.

    Attributes:
        params, macs, latency: relative changes: -0.41 is 41 % fewer. Latency is None where it was not measured.
        agreement: share of images that keep their top-1 class, 0 to 1; None where the scan did not measure it.
        kl: mean KL divergence of the predictions from the original's, in nats.
    """

    params: float
    macs: float
    latency: float | None
    agreement: float | None
    kl: float


@dataclass(frozen=True)
class Pick:
    """One convolution to replace.

    Attributes:
        site: name of the module, "" for the model itself.
        operator, start: as rules write them.
        alone: what the scan measured for this replacement alone.
    """

    site: str
    operator: str
    start: str
    alone: Prediction | None = field(default=None, compare=False, repr=False)

    @property
    def rule(self) -> str:
        """The rule for this site alone, ``conv[name=layer1.0.conv1]->linear-mix by fit``."""
        by = f" by {self.start}" if self.start else ""
        return f"{_selector(self.site)}->{self.operator}{by}"


@dataclass(frozen=True)
class Choice:
    """Which convolutions to replace by what.

    Attributes:
        picks: in the order of execution; every other convolution stays.
        wishes: what was to be reached.
        predicted: for the whole model.
        notes: what did not go as wished, in sentences.
    """

    picks: tuple[Pick, ...]
    wishes: tuple[Wish, ...]
    predicted: Prediction
    notes: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """The picks as rules, one for each site; a rule that keeps everything when there are none."""
        return "; ".join(pick.rule for pick in self.picks) or "all-conv->keep"

    def __str__(self) -> str:
        return choice_text(self)


def _selector(name: str) -> Selector:
    # A name as a glob singles its site out, which a regular expression does not.
    try:
        glob = Glob(name)
    except RuleError:
        glob = None
    if glob is not None and glob.literal:
        return Selector("conv", (Test("name", "=", glob),))
    exact = re.escape(name).replace("\\\n", r"\n")
    return Selector("conv", (Test("name", "=", Regex(rf"\A{exact}\Z")),))


def change(share: float) -> str:
    """A relative change in percent, never rounded to more than it is: ``-0.234`` is ``-23.4 %``."""
    return f"{math.trunc(share * 1e4 + math.copysign(1e-5, share)) / 100:g} %"


def _label(site: str) -> str:
    return site or "(the model itself)"


def choice_text(choice: Choice, width: int = 80) -> str:
    """The picks, and what is predicted beside what was wished for, as tables of ``width`` columns."""
    from rich import box
    from rich.table import Table

    from convsurgery.surgery.table import render

    def table(*columns: str, numbers: Collection[str]) -> Table:
        made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for name in columns:
            number = name in numbers
            made.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
        return made

    count = len(choice.picks)
    head = f"{count} convolution{'s are' if count != 1 else ' is'} replaced; by itself each would do this:"
    picks = table("site", "becomes", "KL", "agreement", "params", "MACs", numbers=("KL", "agreement", "params", "MACs"))
    for pick in choice.picks:
        # A space before the arguments gives the terminal a place to break the line.
        becomes = pick.operator.replace("(", " (") + (f" by {pick.start}" if pick.start else "")
        alone = pick.alone
        cells = ("", "", "", "")
        if alone is not None:
            agreed = "n/a" if alone.agreement is None else f"{100 * alone.agreement:.4g} %"
            cells = (f"{alone.kl:.2g}", agreed, change(alone.params), change(alone.macs))
        picks.add_row(_label(pick.site), becomes, *cells)
    whole = table("the whole model", "predicted", "wished", numbers=("predicted", "wished"))
    wished = {wish.metric: wish for wish in choice.wishes}
    for metric, name in _NAMES.items():
        value = getattr(choice.predicted, metric)
        if value is None:
            continue
        wish = wished.get(metric)
        if metric == "kl":
            shown, bound = f"{value:.2g}", ""
        elif metric == "agreement":
            shown, bound = f"{100 * value:.4g} %", f"{wish.op} {100 * wish.value:.10g} %" if wish else ""
        else:
            shown, bound = change(value), f"{wish.op} {100 * wish.value:.10g} %" if wish else ""
        whole.add_row(name, shown, bound)
    first = [head, picks] if choice.picks else ["no convolution is replaced"]
    return render(*first, "", whole, *choice.notes, width=width)


def unreachable_text(
    scan: Scan,
    wishes: Sequence[Wish],
    most: Mapping[str, float],
    together: Mapping[str, float | None],
    exclude: Collection[str | tuple[str, str]],
    sizes: Mapping[str, int] | None,
) -> str:
    """What to tell of a budget out of reach.

    Args:
        most: the largest share that can be saved, for every saving wished for.
        together: the same while the other wishes hold, where each could be reached alone; else empty.
        exclude: sites, or pairs (site, operator), that were not to be chosen.
        sizes: parameters by site, where they are known.
    """
    budget = ", ".join(map(str, wishes))
    lines = [f"the budget {budget} cannot be reached with the operators of this scan of {scan.model}"]
    missed = []
    for wish in wishes:
        if wish.metric not in most:
            continue
        line = f"{wish.metric}: {change(-most[wish.metric])} is the most; wanted {100 * wish.value:.10g} %"
        both = together.get(wish.metric)
        if both is not None:
            line += f"; {change(-both)} is the most where the other savings hold"
        lines.append(line)
        if together or most[wish.metric] < -wish.value:
            missed.append(wish.metric)
    against = _standing(scan, missed, exclude, sizes)
    if against:
        lines += ["what stands against it:", *(f"  {line}" for line in against[:_SHOWN])]
        if len(against) > _SHOWN:
            lines.append(f"  … and {len(against) - _SHOWN} more convolutions")
        lines.append("what would work: a smaller saving, or operators that can take these convolutions")
    else:
        lines.append("every convolution saves something already; what would work: a smaller saving, or other operators")
    return "\n".join(lines)


def _standing(
    scan: Scan, missed: Sequence[str], exclude: Collection[str | tuple[str, str]], sizes: Mapping[str, int] | None
) -> list[str]:
    """A line for each convolution that saves nothing of what is missed, the largest first."""
    rows: dict[str, list[ScanRow]] = {}
    for row in sorted(scan.rows, key=lambda row: row.index):
        rows.setdefault(row.site, []).append(row)
    idle = {}
    for site, tried in rows.items():
        reasons = [(row.operator, _reason(row, missed, exclude)) for row in tried]
        if all(reason is not None for _, reason in reasons):
            idle[site] = reasons
    known = sizes or {}
    lines = []
    # The sort is stable: convolutions of unknown size stay in the order of execution.
    for site in sorted(idle, key=lambda site: -known.get(site, 0)):
        held = f", {100 * known[site] / max(1, scan.params_total):.3g} % of the parameters" if site in known else ""
        by_reason: dict[str, list[str]] = {}
        for operator, reason in idle[site]:
            by_reason.setdefault(str(reason), []).append(operator)
        why = "excluded" if site in exclude else "; ".join(f"{', '.join(ops)}: {why}" for why, ops in by_reason.items())
        lines.append(f"{_label(site)}{held}: {why}")
    return lines


def _reason(row: ScanRow, missed: Sequence[str], exclude: Collection[str | tuple[str, str]]) -> str | None:
    """Why a row adds nothing to what is missed, or None when it does."""
    if row.site in exclude or (row.site, row.operator) in exclude:
        return "excluded"
    if row.reason is not None:
        return row.reason
    if row.kl is None or not math.isfinite(row.kl):
        return "the predictions are not finite"
    saved = {"params": row.params_saved or 0, "macs": row.macs_saved or 0, "latency": row.latency_saved or 0}
    idle = [metric for metric in missed if saved[metric] <= 0]
    return f"saves no {' and no '.join(idle)}" if idle else None


@dataclass(frozen=True)
class Point:
    """A choice on the trade-off curve.

    Attributes:
        saving: share of the model that is saved, 0.4 for 40 %.
        predicted: agreement by the scan, 0 to 1, or None where it was not measured.
        measured: agreement of the converted model, or None where it was not converted.
        label: written beside the measured dot.
    """

    saving: float
    predicted: float | None
    measured: float | None = None
    label: str = ""


def draw_trade_off(points: Sequence[Point], path: str | Path) -> None:
    """Agreement against saving as an SVG: predicted as a dashed line, measured as dots.

    Raises:
        ArgumentError: for no points.
        ConvSurgeryError: where matplotlib is not installed.
        StorageError: for a path that cannot be written.
    """
    if not points:
        raise ArgumentError("points", "a trade-off needs at least one point to draw")
    line = sorted(points, key=lambda point: point.saving)
    predicted = [point.predicted for point in line if point.predicted is not None]
    if len(predicted) < len(points):
        raise ArgumentError("points", "the scan holds no agreement to draw: its notes say why")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConvSurgeryError("the trade-off is drawn by matplotlib: pip install matplotlib") from error
    path = Path(path)
    dots = [(point, 100 * point.measured) for point in line if point.measured is not None]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    savings = [100 * point.saving for point in line]
    axis.plot(savings, [100 * at for at in predicted], "--", color="tab:grey", label="predicted")
    if dots:
        axis.plot([100 * point.saving for point, _ in dots], [at for _, at in dots], "o", label="measured", gid="dots")
    for point, at in dots:
        place = (100 * point.saving, at)
        # Towards the middle, so that no label leaves the frame.
        right = point.saving > (min(p.saving for p, _ in dots) + max(p.saving for p, _ in dots)) / 2
        offset, side = ((-6, 5), "right") if right else ((5, 5), "left")
        axis.annotate(
            point.label, place, xytext=offset, textcoords="offset points", fontsize=8, ha=side, parse_math=False
        )
    axis.set_xlabel("saved, %")
    axis.set_ylabel("images with the same top-1 class, %")
    axis.grid(True, alpha=0.25)
    axis.legend()
    output_folder(path.parent)
    # The same points give the same file.
    with writing(path) as staged, matplotlib.rc_context({"svg.hashsalt": "convsurgery"}):
        try:
            figure.savefig(staged, format="svg", metadata={"Date": None})
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}") from error
