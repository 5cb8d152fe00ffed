"""What each operator costs and saves at each site: one convolution replaced at a time, measured on images."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.adapt.answers import Answers
from convsurgery.adapt.footing import chance, warn_of_random
from convsurgery.adapt.images import calibration_images
from convsurgery.adapt.journal import Journal
from convsurgery.adapt.scan_report import FORMAT, Scan, ScanRow
from convsurgery.adapt.scanning import build, measure, saved_ms, twin_of, walk
from convsurgery.errors import (
    ArgumentError,
    ConversionError,
    ConvSurgeryError,
    DataError,
    ModelError,
    NoMatchError,
    RuleError,
)
from convsurgery.files import alone
from convsurgery.geometry import Site
from convsurgery.graph import Observation, as_arguments, observe
from convsurgery.operators import OperatorConfig, Start, bind
from convsurgery.plain import declared
from convsurgery.rules import PredicateSelector, Rule, Rules, Selector, as_target, parse_selector, parse_target
from convsurgery.surgery import Entry, make_plan, unwrap, weights_of

__all__ = ["Scan", "ScanRow", "scan"]


def scan(
    model: nn.Module,
    operators: Any,
    data: Any,
    *,
    where: str = "all-conv",
    start: str | Start | None = None,
    images: int | None = 256,
    seed: int = 0,
    latency: bool = True,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_row: Callable[[ScanRow], object] | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
) -> Scan:
    """Replace one convolution at a time, by each operator, and measure what is lost and saved.

    A model that FX traces is computed once up to each site, and only what comes behind is computed for each operator;
    of any other model the whole. The values needed at a site are kept for all images.

    Args:
        model: a classifier; not changed. It is measured in eval mode.
        operators: ``"linear-mix | kerv-poly(degree=2) by copy"``, or a sequence of such texts and of configs. They must
            take the place of one convolution.
        data: a tensor of images, a Dataset or a pair (train, val), a DataLoader, an iterable of images or ``(images,
            labels)``, or a folder.
        where: a selector, the left side of a rule.
        start: how operators begin that do not say it themselves by ``by``; None for their own choice, with data.
        images: how many to use at most: of a folder, data set or tensor a part drawn from the whole, evenly over
            folders or classes; of a loader or another iterable the first ones.
        seed: of the draw.
        latency: whether layers and model are timed.
        output: a folder for the results. Every row is added to its ``rows.jsonl`` when it is finished.
        resume: whether to go on with the rows there.
        overwrite: whether to replace an earlier scan there.
        on_row: called with every row that was not there before.
        example_inputs: what sites are observed on; one of the images by default.

    Returns:
        The rows, those that could not be measured with their reason. Agreement is left out where the model answers all
        images with one class. Warns when the model's weights are random.

    Raises:
        RuleError: for operators or a selector that cannot be read; NoMatchError when no convolution matches.
        ConversionError: for an operator that takes the place of several layers.
        ModelError: for a model that does not run on the images, or gives no finite scores.
        StorageError: for a folder with rows of another scan, with rows and without ``resume`` or ``overwrite``, or
            into which another scan is being written.

    Example::

        found = scan(model, "linear-mix | pnn", loader, where="conv[k=3]", images=64)
        print(found)
    """
    if unwrap(model) is not model:
        raise ModelError(f"{type(model).__name__} wraps the model: scan the model itself")
    if resume and output is None:
        raise ArgumentError("resume", "resume=True goes on with rows in a folder: give output=folder")
    options, selector = _options(operators, start), parse_selector(where)
    source = calibration_images(data, model, images=images, seed=seed)
    labelled = list(source.labelled())
    if not labelled:
        raise DataError("there are no images to measure on")
    batches = [batch for batch, _ in labelled]
    # A copy: a model whose control flow depends on values is observed on them, and may work on them in place.
    inputs: Any = batches[0][:1].clone() if example_inputs is None else example_inputs
    seen = observe(model, as_arguments(inputs))
    label, jobs = _label(model), _jobs(seen, selector, options, _label(model))
    warn_of_random(model=model)
    with contextlib.nullcontext() if output is None else alone(Path(output).expanduser()):
        journal, done = None, dict[tuple[str, str, str], ScanRow]()
        if output is not None:
            header = {
                "format": FORMAT,
                "model": label,
                "weights": _digest(model.state_dict().items()),
                "operators": [option.text for option in options],
                "where": str(selector),
                "start": "" if start is None else str(Start.parse(start)),
                "latency": latency,
                "inputs": [list(shape) for shape in seen.input_shapes],
                "images": _digest(("", batch) for batch in batches),
            }
            journal = Journal(output, header, resume=resume, overwrite=overwrite)
            done = {row.key: row for row in map(ScanRow.from_dict, journal.rows)}

        def finish(row: ScanRow) -> None:
            done[row.key] = row
            if journal is not None:
                journal.add(row.to_dict())
            if on_row is not None:
                on_row(row)

        with torch.no_grad():
            answers, how = _measure(model, labelled, jobs, done, finish, latency)
        rows = tuple(done[job.row.key] for job in jobs)
        params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        macs = sum(site.cost.macs for site in seen.sites)
        took = answers.milliseconds if latency else None
        told = (str(source), str(weights_of(model)), _notes(rows, answers))
        found = Scan(label, rows, sum(map(len, batches)), params, macs, took, how, *told)
        if output is not None:
            found.save(output)
    return found


@dataclass(frozen=True)
class _Option:
    """An operator, and the start it is wanted with."""

    config: OperatorConfig
    start: Start | None

    @property
    def text(self) -> str:
        return str(self.config) if self.start is None else f"{self.config} by {self.start}"


@dataclass(frozen=True)
class _Job:
    """A row to measure: what is known of it beforehand; with ``row.reason`` there is nothing to measure."""

    row: ScanRow
    site: Site
    config: OperatorConfig
    start: Start | None


def _options(operators: Any, start: str | Start | None) -> tuple[_Option, ...]:
    several = isinstance(operators, Iterable) and not isinstance(operators, str)
    targets = []
    for item in operators if several else (operators,):
        if isinstance(item, str):
            targets += [parse_target(text) for text in item.split("|")]
        else:
            targets.append(as_target(item))
    if not targets:
        raise RuleError("a scan needs operators", hint="e.g. linear-mix | kerv-poly(degree=2)")
    wanted, options = None if start is None else Start.parse(start), []
    for target in targets:
        config, own = bind(target), target.by
        if config.takes():
            hint = "write residual=false" if hasattr(config, "residual") else "name operators that replace one"
            raise ConversionError(f"{config} takes the place of several layers, a scan replaces convolutions: {hint}")
        options.append(_Option(config, Start.parse(own) if own else wanted))
    return tuple({option.text: option for option in options}.values())


def _jobs(seen: Observation, selector: Selector, options: Sequence[_Option], label: str) -> list[_Job]:
    """What is to be measured, by site in execution order, then in the order of the operators."""
    found: list[tuple[int, int, _Job]] = []
    missed: dict[int, NoMatchError] = {}
    for number, option in enumerate(options):
        try:
            entries = _entries(seen, selector, option.config, label)
        except NoMatchError as error:
            missed[number] = error
        else:
            found += [(entry.site.index, number, _job(entry, option)) for entry in entries]
    if len(missed) == len(options):
        raise missed[0]
    sites = {job.site.name: job.site for _, _, job in found}
    for number, miss in missed.items():
        found += [(site.index, number, _left(site, options[number], miss.message)) for site in sites.values()]
    found.sort(key=lambda item: (item[0] < 0, item[0], item[2].site.name, item[1]))
    # Two ways of asking may come to the same start.
    return list({job.row.key: job for _, _, job in found}.values())


def _entries(seen: Observation, selector: Selector, config: OperatorConfig, label: str) -> list[Entry]:
    target = config.to_target()
    try:
        plan = make_plan(label, 0, seen, Rules((Rule(selector, target),)), data=True)
    except ConversionError:
        if selector.structural:
            raise
        # A convolution that is named alone is a row with a reason here, like any other.
        taken = PredicateSelector(lambda site: selector.reason(site, seen.sites) is None)
        plan = make_plan(label, 0, seen, Rules((Rule(taken, target),)), data=True)
    return [entry for entry in plan.entries if entry.rule is not None and entry.block is None]


def _job(entry: Entry, option: _Option) -> _Job:
    if entry.config is None:
        return _left(entry.site, option, str(entry.reason))
    try:
        start = entry.config.start_for(option.start, entry.site, data=True)
    except ArgumentError as error:
        return _left(entry.site, option, error.message)
    if start.name == "blend":
        return _left(entry.site, option, "by blend it begins as the convolution; name the start that is blended in")
    saved = (entry.before.params - entry.after.params, entry.before.macs - entry.after.macs)
    row = ScanRow(
        entry.site.name, entry.site.index, str(option.config), str(start), params_saved=saved[0], macs_saved=saved[1]
    )
    return _Job(row, entry.site, option.config, start)


def _left(site: Site, option: _Option, reason: str) -> _Job:
    start = "" if option.start is None else str(option.start)
    return _Job(ScanRow(site.name, site.index, str(option.config), start, reason=reason), site, option.config, None)


def _measure(
    model: nn.Module,
    labelled: Sequence[tuple[Tensor, Tensor | None]],
    jobs: Sequence[_Job],
    done: Mapping[tuple[str, str, str], ScanRow],
    finish: Callable[[ScanRow], None],
    latency: bool,
) -> tuple[Answers, str]:
    """Measure all jobs that are not done; returns what the model answers, and how it was seen."""
    twin = twin_of(model)
    batches = [batch for batch, _ in labelled]
    way = walk(twin, batches)
    answers = Answers(twin, batches, [labels for _, labels in labelled])
    by_site: dict[str, list[_Job]] = {}
    for job in jobs:
        if job.row.key not in done:
            by_site.setdefault(job.site.name, []).append(job)
    convs: Any = {name: twin.get_submodule(name) for name in by_site}
    for name in sorted(by_site, key=lambda name: way.place(convs[name])):
        todo = by_site[name]
        stand = way.stand(convs[name]) if any(job.start is not None for job in todo) else None
        for job in todo:
            if stand is None or job.start is None:
                finish(job.row)
                continue
            try:
                new = build(twin, job.site, job.config, job.start, stand)
                damage = measure(way, stand, new, answers)
            except ConvSurgeryError as error:
                reason = str(error).strip().splitlines()[0]
                finish(dataclasses.replace(job.row, reason=reason, params_saved=None, macs_saved=None))
                continue
            saved = saved_ms(stand, new) if latency else None
            finish(dataclasses.replace(job.row, **vars(damage), latency_saved=saved))
        if stand is not None:
            way.leave(stand)
    return answers, way.seen


def _notes(rows: Sequence[ScanRow], answers: Answers) -> tuple[str, ...]:
    """Why agreement was not measured, and which replacements alone end no better than the most frequent class."""
    notes = [f"agreement {answers.refused}"] if answers.refused is not None else []
    own = chance(answers.correct, answers.occurring)
    if own is not None:
        return (*notes, own)
    lost = []
    for row in rows:
        if row.top1 is not None and chance(round(row.top1 * answers.images), answers.occurring) is not None:
            lost.append(f"{row.operator} at {row.site or '(the model itself)'}")
    if lost:
        usual = 100 * int(answers.occurring.max()) / answers.images
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        notes.append(
            f"right answers no better than always the most frequent class ({usual:.2f} %) by one replacement alone: "
            f"{', '.join(lost[:3])}{more}"
        )
    return tuple(notes)


def _label(model: nn.Module) -> str:
    base = getattr(model, "_convsurgery_base", None)
    cfg = declared(model)
    return str(base.name if base is not None else cfg.get("architecture") or type(model).__name__)


def _digest(tensors: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 over names, kinds and bytes."""
    digest = hashlib.sha256()
    for name, value in tensors:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
