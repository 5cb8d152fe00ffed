"""What a scan found: as a table, as JSON, as CSV, as a figure, and in a folder."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convsurgery.errors import ConvSurgeryError, StorageError, warn
from convsurgery.files import member, output_folder, read_text, write_text
from convsurgery.plain import parse_json

__all__ = ["FORMAT", "Scan", "ScanRow", "draw"]

FORMAT = 1


@dataclass(frozen=True)
class ScanRow:
    """One operator at one site.

    Attributes:
        site: the convolution's name; "" is the model itself.
        index: its position in execution order; -1 when no forward call reaches it.
        operator: the operator, as in rules.
        start: how it began, as ``neutral(eps=0.001)``; of a row that was not measured the start that was wanted, or "".
        error: relative error at the layer's output: √(mean square over variance), channels averaged.
        kl: mean Kullback-Leibler divergence of the replaced model's answers from the model's own, in nats; infinite
            for scores that are not finite.
        agreement: share of images that are answered as before, 0 to 1; None where the model answers all of them with
            one class, so that keeping its answers would say nothing.
        params_saved: trainable parameters; below 0 when the operator has more.
        macs_saved: multiply-accumulates for one image.
        latency_saved: milliseconds for one image, layer against convolution; None when not measured.
        reason: why the row was not measured; the numbers are then None.
        top1: share of images that are answered right, 0 to 1; None where labels are not known.
    """

    site: str
    index: int
    operator: str
    start: str
    error: float | None = None
    kl: float | None = None
    agreement: float | None = None
    params_saved: int | None = None
    macs_saved: int | None = None
    latency_saved: float | None = None
    reason: str | None = None
    top1: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row as texts and numbers; what is not finite becomes a text, for JSON has no such numbers."""
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, data: Any) -> ScanRow:
        """Read what :meth:`to_dict` gives; StorageError for anything else."""
        try:
            # Rows of earlier versions know no labels.
            row = cls(**{name: _read(name, data[name]) for name in COLUMNS if name != "top1" or name in data})
        except KeyError as error:
            raise StorageError(f"a row of the scan has no {error}") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise StorageError(f"a row of the scan is not what convsurgery writes: {error}") from error
        if row.reason is None and None in (row.error, row.kl, row.params_saved, row.macs_saved):
            raise StorageError(f"the row of {row.operator} at {row.site!r} has neither numbers nor a reason")
        return row

    @property
    def key(self) -> tuple[str, str, str]:
        """Site, operator and start: what no two rows of a scan have in common."""
        return self.site, self.operator, self.start


#: the columns of a table of rows
COLUMNS = tuple(field.name for field in dataclasses.fields(ScanRow))


def _read(name: str, value: Any) -> Any:
    """A field of a row by its kind."""
    if name in ("site", "operator", "start", "reason"):
        if not isinstance(value, str) and not (value is None and name == "reason"):
            raise TypeError(f"{name} is {value!r}")
        return value
    if name == "index":
        return int(value)
    if value is None:
        return None
    return int(value) if name in ("params_saved", "macs_saved") else float(value)


@dataclass(frozen=True)
class Scan:
    """What :func:`scan` measured; prints as a table.

    Attributes:
        model: the model's name or class.
        rows: by site in execution order, then in the order of the operators.
        images: how many were used.
        params_total: trainable parameters of the model.
        macs_total: multiply-accumulates of all its convolutions for one image.
        forward_ms: milliseconds of its forward for one image, or None.
        seen: whether only what comes behind each site was computed again (FX), or the whole model, and why.
        data: which images these were, such as "256 of 1,347 images, seed 0".
        weights: where the model's weights come from, as far as it is known.
        notes: what else there is to say: why agreement was not measured, answers no better than chance.
    """

    model: str
    rows: tuple[ScanRow, ...]
    images: int
    params_total: int
    macs_total: int
    forward_ms: float | None
    seen: str
    data: str = ""
    weights: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self, indent: int | None = None) -> str:
        """The scan as a JSON text that :meth:`from_json` reads back to an equal scan."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data = {"format": FORMAT, **plain, "rows": [row.to_dict() for row in self.rows]}
        return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Scan:
        """Read a scan written by :meth:`to_json`.

        Raises:
            StorageError: for anything else, saying what is missing or of the wrong kind.
        """
        data = parse_json(text, "the scan")
        if not isinstance(data, dict):
            raise StorageError(f"the scan is not what convsurgery writes: {data!r:.80}")
        try:
            if data["format"] != FORMAT:
                raise StorageError(f"the scan has format {data['format']!r}; this version reads {FORMAT}")
            rows = tuple(map(ScanRow.from_dict, data["rows"]))
            images, params, macs = (int(data[name]) for name in ("images", "params_total", "macs_total"))
            took = None if data["forward_ms"] is None else float(data["forward_ms"])
            # Scans of earlier versions do not say these.
            _check_agreement(rows, data.get("notes", ()))
            told = (str(data.get("data", "")), str(data.get("weights", "")), tuple(map(str, data.get("notes", ()))))
            return cls(str(data["model"]), rows, images, params, macs, took, str(data["seen"]), *told)
        except KeyError as error:
            raise StorageError(f"the scan has no {error}") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise StorageError(f"the scan is not what convsurgery writes: {error}") from error

    def to_csv(self) -> str:
        """All rows as CSV, named by their attributes; what was not measured is empty."""
        return scan_csv(self.rows, COLUMNS)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``scan.json``, ``scan.csv`` and ``scan.svg``; the figure is left out where matplotlib is missing.

        Returns:
            The folder's path; it is made when absent.

        Raises:
            StorageError: when the folder cannot be written.
        """
        return write_all(self, directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Scan:
        """The scan in a folder that :meth:`save` wrote; StorageError where there is none."""
        return cls.from_json(read_text(member(Path(directory), "scan.json")))

    def __str__(self) -> str:
        return scan_text(self)


def _check_agreement(rows: Sequence[ScanRow], notes: Sequence[Any]) -> None:
    """A scan without agreements says why in its notes."""
    for row in rows:
        if row.reason is None and row.agreement is None and not any("n/a" in str(note) for note in notes):
            raise StorageError(f"the row of {row.operator} at {row.site!r} has neither numbers nor a reason")


def scan_text(scan: Scan, width: int = 80) -> str:
    """The measured rows as a table, those left out summarised below."""
    from rich import box
    from rich.table import Table

    from convsurgery.surgery.table import count, render

    def signed(number: int) -> str:
        return count(number) if number >= 0 else f"-{count(-number)}"

    measured = [row for row in scan.rows if row.reason is None]
    timed = any(row.latency_saved is not None for row in measured)
    head = f"{scan.model}, {scan.images} images: {len(measured)} replacements of one convolution measured"
    heads = ("site", "operator", "error", "KL", "agree", "params", "MACs", *(["ms"] if timed else []))
    starts = _starts(measured)
    cells = []
    for row in measured:
        # A space before the arguments gives the terminal a place to break the line.
        operator = row.operator.replace("(", " (")
        if len(starts[row.operator]) > 1:
            operator += f" by {row.start}"
        line = [_label(row), operator, _short(row.error), _short(row.kl), _percent(row.agreement)]
        line += [signed(row.params_saved or 0), signed(row.macs_saved or 0)]
        cells.append([*line, *([_short(row.latency_saved)] if timed else [])])
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    # Sites are told apart by the ends of their names, so operators give way first, down to their names.
    free = width - sum(widths[2:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(8, free - 12))
    widths[1] = min(widths[1], max(8, free - widths[0]))
    for name, size in zip(heads, widths, strict=True):
        text = name in ("site", "operator")
        table.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=not text, width=size)
    for line in cells:
        table.add_row(*line)
    lines = [f"{operator} by {', '.join(used)}" for operator, used in starts.items()]
    lines += [*_left_out(scan.rows), *scan.notes]
    lines.append("error: at the layer's output. params, MACs, ms: saved, for one image; below 0 it costs more")
    lines += [f"images: {scan.data}"] * bool(scan.data) + [f"weights: {scan.weights}"] * bool(scan.weights)
    lines.append(f"seen by {scan.seen}")
    total = f"the model: {count(scan.params_total)} parameters, {count(scan.macs_total)} MACs in convolutions"
    lines.append(total if scan.forward_ms is None else f"{total}, {scan.forward_ms:.3g} ms per image")
    return render(head, table, "\n".join(lines), width=width)


def _starts(rows: Sequence[ScanRow]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        used = found.setdefault(row.operator, [])
        if row.start not in used:
            used.append(row.start)
    return found


def _left_out(rows: Sequence[ScanRow]) -> list[str]:
    """One line for each operator and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason is not None:
            groups.setdefault((row.operator, row.reason), []).append(_label(row))
    lines = []
    most = sorted(groups.items(), key=lambda item: -len(item[1]))
    for (operator, reason), names in most[:8]:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{operator} not measured at {', '.join(names[:3])}{more}: {reason}")
    rest = sum(len(names) for _, names in most[8:])
    return [*lines, f"not measured for other reasons: {rest} more, see rows or scan.csv"] if rest else lines


def _label(row: ScanRow) -> str:
    return row.site or "(the model itself)"


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.2g}"


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f}%"


def scan_csv(rows: Sequence[ScanRow], columns: Sequence[str]) -> str:
    """All rows with a line of heads; what was not measured is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if (value := getattr(row, name)) is None else value for name in columns])
    return stream.getvalue()


def draw(scan: Scan, metric: str = "agreement") -> str:
    """Horizontal bars, one for each site and operator, sites from top to bottom in execution order; as SVG.

    Args:
        scan: what to draw.
        metric: "agreement", the answers that are lost, in percent; or "kl", in nats.

    Raises:
        ConvSurgeryError: where matplotlib is not installed, and for another metric.
    """
    if metric not in ("agreement", "kl"):
        raise ConvSurgeryError(f"a scan is drawn by agreement or kl, not by {metric!r}")
    if metric == "agreement" and any(row.reason is None and row.agreement is None for row in scan.rows):
        raise ConvSurgeryError("the scan has no agreement to draw: " + "; ".join(scan.notes))
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConvSurgeryError("the figure is drawn by matplotlib: pip install matplotlib") from error
    measured = [row for row in scan.rows if row.reason is None]
    sites, starts = list(dict.fromkeys(_label(row) for row in measured)), _starts(measured)
    several = [(operator, start) for operator, used in starts.items() for start in used]
    heights = [_height(row, metric) for row in measured]
    worst = max((height for height in heights if math.isfinite(height)), default=0.0) or 1.0
    each = 0.8 / max(1, len(several))
    # A millimetre or two for each bar, so that names stay readable however many sites there are.
    height = 1.2 + len(sites) * max(0.16, 0.07 * len(several))
    with matplotlib.rc_context({"svg.hashsalt": "convsurgery", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, height), layout="constrained")
        axis = figure.subplots()
        for number, (operator, start) in enumerate(several):
            rows = [row for row in measured if (row.operator, row.start) == (operator, start)]
            places = [sites.index(_label(row)) + (number + 0.5) * each - 0.4 for row in rows]
            # What is not finite reaches as far as the worst of the others, and more: it must not look harmless.
            bars = [min(_height(row, metric), 1.1 * worst) for row in rows]
            axis.barh(places, bars, each, label=f"{operator} by {start}")
        axis.set_yticks(range(len(sites)), sites, fontsize=7)
        axis.set_ylim(len(sites) - 0.4, -0.6)
        axis.set_xlabel("answers lost, %" if metric == "agreement" else "mean KL, nats")
        axis.set_title(f"{scan.model}: one convolution replaced, {scan.images} images", fontsize=9)
        axis.grid(True, axis="x", alpha=0.25)
        if several:
            figure.legend(loc="outside lower center", fontsize=8)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _height(row: ScanRow, metric: str) -> float:
    return 100 * (1 - (row.agreement or 0)) if metric == "agreement" else row.kl or 0.0


def write_all(scan: Scan, directory: str | os.PathLike[str]) -> Path:
    """``scan.json``, ``scan.csv`` and ``scan.svg``, each put in its place when complete."""
    texts = {"scan.json": scan.to_json(indent=1) + "\n", "scan.csv": scan.to_csv()}
    lost = any(row.agreement is not None and row.agreement < 1 for row in scan.rows)
    try:
        texts["scan.svg"] = draw(scan, "agreement" if lost else "kl")
    except ConvSurgeryError as error:
        warn(f"scan.svg is left out: {error}")
    folder = output_folder(directory)
    for name, text in texts.items():
        write_text(folder / name, text, named=False)
    return folder
