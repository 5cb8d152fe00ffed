"""Calibration: what of a converted model can be fitted without training, and what came of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from convsurgery.adapt.fitting import Fit, FitOptions, LayerFit, fit_layers, fit_method
from convsurgery.adapt.progress import LayerProgress
from convsurgery.geometry import Block
from convsurgery.surgery import Entry, record
from convsurgery.surgery.record import set_record
from convsurgery.surgery.table import render

__all__ = ["Calibration", "fits_of", "fits_of_model", "run_fits"]


@dataclasses.dataclass(frozen=True)
class Calibration(Mapping[str, float]):
    """What a calibration did: a mapping from layer names to the relative error left there, that prints as a table.

    Attributes:
        layers: what was fitted, in execution order.
        data: the images it was fitted on, such as "256 of 1,347 images, seed 0".
        weights: where the weights of the original come from, as far as it is known.
        notes: what else there is to say: answers no better than chance.
    """

    layers: tuple[LayerFit, ...]
    data: str = ""
    weights: str = ""
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float:
        for layer in self.layers:
            if layer.name == name:
                return layer.after
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for name in ("layer", "operator", "fitted by"):
            table.add_column(name, overflow="fold")
        for name in ("before", "after"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("note", overflow="fold")
        for layer in self.layers:
            method = _METHODS.get(layer.method, layer.method)
            errors = (f"{layer.before:.2g}", f"{layer.after:.2g}")
            table.add_row(layer.name or "(the model itself)", layer.operator, method, *errors, layer.note)
        told = [f"images: {self.data}"] * bool(self.data) + [f"weights: {self.weights}"] * bool(self.weights)
        told += self.notes
        return render(f"relative error at the output of {len(self.layers)} layers", table, *told)


_METHODS = {"neutral": "ε, affine", "fit": "least squares", "affine": "affine"}


def fits_of(edits: Sequence[Entry], *, late: bool = False) -> dict[str, Fit]:
    """The operators to fit, in execution order: neutral, fitted, or with the weights but not the function.

    Args:
        edits: of a plan.
        late: those too that began as they do where there are no data, and would have begun by fit with some.
    """
    fits: dict[str, Fit] = {}
    for entry in edits:
        start, site, block, config = entry.start, entry.site, entry.block, entry.config
        if start is None or config is None:
            continue
        if start.name == "blend":
            start = config.blended_start(site)
        method = fit_method(config, start)
        if method is None and late:
            without, with_data = (config.start_for(None, site, data=data).name for data in (False, True))
            method = "fit" if (start.name, with_data) == (without, "fit") else None
        if method is None:
            continue
        ridge = start.value if start.name == "fit" else None
        if block is None:
            norm = None if site.geometry.bias else site.batchnorm
            fits[site.name] = Fit(config.name, method, ridge, norm, calls=site.calls)
        elif method == "fit":
            branch = (block.members[0], block.members[-1])
            fits[block_child(block, fits)] = Fit(config.name, method, ridge, branch=branch)
    return fits


def fits_of_model(model: nn.Module) -> dict[str, Fit]:
    """What a converted model holds to fit now that there are images; empty for one that was not converted."""
    done = record(model)
    return fits_of(done.edits if done else (), late=True)


def block_child(block: Block, taken: Mapping[str, Fit]) -> str:
    """The name that the module in a block's place got under the block's owner."""
    if block.chain:
        return block.members[0]
    names = (f"{block.owner}.{block.pattern}{f'_{i}' if i else ''}".lstrip(".") for i in itertools.count())
    return next(name for name in names if name not in taken)


def run_fits(
    model: nn.Module,
    teacher: nn.Module,
    fits: Mapping[str, Fit],
    images: Iterable[Tensor],
    options: FitOptions,
    *,
    progress: bool,
    on_layer: Callable[[LayerFit], object] | None = None,
) -> Calibration:
    """Carry out ``fits`` on ``model`` and note in its record what belongs to its structure."""
    bar = LayerProgress("calibrating", len(fits), show=progress)

    def told(layer: LayerFit) -> None:
        bar.done(layer.name)
        if on_layer is not None:
            on_layer(layer)

    try:
        layers, norms = fit_layers(model, teacher, fits, images, options, told)
    finally:
        bar.close()
    done = record(model)
    if done is not None and norms:
        set_record(model, dataclasses.replace(done, norms={**done.norms, **norms}))
    return Calibration(layers)
