"""Fits of operators to the convolutions they replaced: layer by layer, streaming over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.adapt.reconstruction import Reconstructed, reconstruct
from convsurgery.adapt.running import eval_mode
from convsurgery.errors import ConversionError, DataError, SettingsError
from convsurgery.operators import Blend, Fitter, OperatorConfig, OperatorLayer, Start
from convsurgery.operators.kervolution import AffineFit, NeutralFit, ScaleFit
from convsurgery.operators.moments import Moments
from convsurgery.surgery.absorb import absorb, can_absorb

__all__ = ["Fit", "LayerFit", "fit_layers", "fit_method"]

#: values of a layer's input and output that a fit works on at a time: float64 and features multiply them
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Fit:
    """How one operator is fitted.

    Attributes:
        operator: as it is called in tables.
        method: "neutral", "fit" or "affine".
        ridge: strength of the penalty; None for the operator's own.
        batchnorm: name of the BatchNorm that alone consumes its output, to take what the operator cannot hold.
        branch: for the place of a residual block, the first and the last module of its branch in the original: the
            first is given y, the last gives what is added to it.
        calls: how often one forward pass calls it.
    """

    operator: str = ""
    method: str = "fit"
    ridge: float | None = None
    batchnorm: str | None = None
    branch: tuple[str, str] | None = None
    calls: int = 1


@dataclass(frozen=True)
class LayerFit:
    """What a fit did.

    Attributes:
        name: the layer's.
        operator: what stands there.
        method: how it was fitted.
        before: relative error of its output before, √(mean square of the error over the variance), channels averaged.
        after: the same afterwards.
        note: what else there is to say: the ε found, a penalty that had to be raised, saturation.
    """

    name: str
    operator: str
    method: str
    before: float
    after: float
    note: str = ""


@dataclass(frozen=True)
class FitOptions:
    """Settings of a calibration.

    Attributes:
        target: relative error that a neutral start may have in each layer; None for 1e-3.
        batchnorm: whether a BatchNorm behind a fitted layer is given the mean and variance it now meets.
        steps: of gradient descent on each fitted layer afterwards.
        lr: of these, relative to the weights' size.
    """

    target: float | None = None
    batchnorm: bool = False
    steps: int = 0
    lr: float = 1e-2

    def __post_init__(self) -> None:
        if self.target is not None and not 0 < self.target < float("inf"):
            raise SettingsError(f"target must be a number above 0, such as 1e-3, not {self.target} (--target)")
        if self.steps < 0:
            raise SettingsError(f"steps must be at least 0, not {self.steps} (--steps)")


def fit_layers(
    model: nn.Module,
    teacher: nn.Module,
    layers: Mapping[str, Fit],
    images: Iterable[Tensor],
    options: FitOptions = FitOptions(),
    on_layer: Callable[[LayerFit], object] | None = None,
) -> tuple[tuple[LayerFit, ...], dict[str, float]]:
    """Fit each named operator to the outputs of the convolution it replaced.

    Layer by layer in the order given (execution order), so that a later layer is fitted to what the earlier ones now
    give. A pass over ``images`` runs no further than the layer; no activation is kept beyond its batch.

    Args:
        model: the converted model; changed in place.
        teacher: the original model, with convolutions of the same names; not changed.
        layers: the operators to fit, by name.
        images: batches (N, C, H, W), the same in every pass.
        options: see there.
        on_layer: called when a layer is done.

    Returns:
        What was done, layer by layer, and the new epsilon of every BatchNorm that took over gains, by name.

    Raises:
        DataError: when there is nothing to go through, or the images do not fit the model.
        ConversionError: for a layer that has no fit, or is not in the teacher.
    """
    done: list[LayerFit] = []
    norms: dict[str, float] = {}
    with eval_mode(model, teacher):
        for name, fit in layers.items():
            kept = _state(model, name, fit, options)
            try:
                done.append(_Place(model, teacher, name, fit, images).fit(options, norms))
            except BaseException:
                _restore(kept)
                raise
            if on_layer is not None:
                on_layer(done[-1])
    return tuple(done), norms


def _state(model: nn.Module, name: str, fit: Fit, options: FitOptions) -> list[tuple[nn.Module, Any, Any, Any]]:
    """What a fit changes, to put it back: constants, weights where they are fitted, and the BatchNorm behind."""
    weights = fit.method == "fit" or options.steps > 0
    kept = []
    for part in (model.get_submodule(name), *([model.get_submodule(fit.batchnorm)] if fit.batchnorm else [])):
        for module in part.modules():
            buffers = {key: None if b is None else b.clone() for key, b in module._buffers.items()}
            values = {
                key: p.detach().clone()
                for key, p in module._parameters.items()
                if p is not None and (weights or key.startswith("log_"))
            }
            kept.append((module, buffers, values, getattr(module, "eps", None)))
    return kept


@torch.no_grad()
def _restore(kept: list[tuple[nn.Module, Any, Any, Any]]) -> None:
    for module, buffers, values, eps in kept:
        module._buffers.update(buffers)
        for key, value in values.items():
            parameter = module._parameters[key]
            assert parameter is not None
            parameter.copy_(value)
        if isinstance(eps, float):
            module.eps = eps  # type: ignore[assignment]


def fit_method(config: OperatorConfig, start: Start) -> str | None:
    """How an operator that begins so is fitted: "neutral", "fit" or "affine"; None where nothing is left to data."""
    if start.name == "copy" and config.starts["copy"] == "none":
        return "affine"
    return start.name if start.name in ("neutral", "fit") else None


class _Enough(Exception):
    """Raised by a hook: what comes behind the layer is not needed."""


class _Place:
    """One layer between the model's and the teacher's activations."""

    def __init__(self, model: nn.Module, teacher: nn.Module, name: str, fit: Fit, images: Iterable[Tensor]) -> None:
        self.model, self.teacher, self.name, self.plan, self.images = model, teacher, name, fit, images
        self.outer = model.get_submodule(name)
        layer = self.outer.new if isinstance(self.outer, Blend) else self.outer
        parts = dict(teacher.named_modules(remove_duplicate=False))
        first, last = (parts.get(each) for each in fit.branch or (name, name))
        if first is None or last is None or (fit.branch is None and not isinstance(first, nn.Conv2d)):
            missing = name if fit.branch is None else fit.branch[0 if first is None else 1]
            raise ConversionError(f"the teacher has no convolution {missing!r}: it must be the model before conversion")
        self.first, self.last = first, last
        # In a blend the convolution goes through the BatchNorm too, which then cannot be given to the operator.
        behind = None if isinstance(self.outer, Blend) else fit.batchnorm
        self.norm, self.its_norm = (_norm(part, behind) for part in (model, teacher))
        fitter = (
            layer.fitter(last, fit.ridge, shift=self.norm is not None) if isinstance(layer, OperatorLayer) else None
        )
        if fitter is None or not isinstance(layer, OperatorLayer):
            raise ConversionError(f"{name}, a {type(layer).__name__}, has no closed-form fit")
        self.layer, self.fitter = layer, fitter

    def fit(self, options: FitOptions, norms: dict[str, float]) -> LayerFit:
        before, notes = Moments(), []
        fitter: Fitter = self.fitter
        if options.target is not None and isinstance(fitter, NeutralFit):
            fitter.target = options.target
        if isinstance(fitter, (AffineFit, ScaleFit)):
            fitter.matched = isinstance(self.outer, Blend)
        first = True
        while True:
            for given, target in self.pairs(local=fitter.local):
                with torch.no_grad():
                    output = self._output(given, target)
                    prepared = given if fitter.local else self.layer.prepared(given)
                if first:
                    before.add(output, target)
                fitter.add(prepared, output, target)
            first = False
            error = fitter.finish()
            if error is not None:
                break
        self._hand_over(norms)
        notes += [fitter.note, self._saturation()]
        if options.steps and self.plan.method != "neutral":
            improved: Reconstructed = reconstruct(self.layer, self.pairs, options.steps, options.lr, self._shift())
            error, note = improved.error, improved.note
            notes.append(note)
        if options.batchnorm and self.plan.method != "neutral":
            self._match_statistics()
        note = "; ".join(note for note in notes if note)
        # A gain that a BatchNorm makes up for is no error.
        absorbed = isinstance(fitter, NeutralFit) and fitter.absorb
        was = before.error(before.gain() if absorbed else 1.0)
        return LayerFit(self.name, self.plan.operator, self.plan.method, was, error, note)

    def _output(self, given: Tensor, target: Tensor) -> Tensor:
        try:
            output: Tensor = self.layer(given)
        except RuntimeError as error:
            raise _cannot_run(given, error) from error
        if output.shape != target.shape:
            shapes = " and ".join("x".join(map(str, t.shape[1:])) for t in (output, target))
            raise ConversionError(
                f"{self.name} and the teacher's give {shapes}: the teacher must be the model before conversion"
            )
        return output

    def pairs(self, *, local: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The layer's input as it is now, and what it should give: parts of batches, small enough to work on.

        Args:
            local: it should give what its convolution gives on the same input; else what it gave in the teacher.
        """
        count = 0
        for images in self.images:
            for given, target in self._batch(images, local):
                size = max(1, _CHUNK // max(1, given[0].numel() + target[0].numel()))
                count += len(given)
                yield from zip(given.split(size), target.split(size), strict=True)
        if not count:
            raise DataError("the calibration data is empty")

    def _batch(self, images: Tensor, local: bool) -> Sequence[tuple[Tensor, Tensor]]:
        seen: list[Tensor] = []
        wanted: list[Tensor] = []
        calls = self.plan.calls

        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            # What comes behind may work in place, so that it is copied.
            seen.append(args[0].detach().clone())
            if len(seen) == calls:
                raise _Enough

        with torch.no_grad():
            self._run(self.model, images, [self.outer.register_forward_pre_hook(look)])
            if local:
                wanted = [self._convolved(x, images) for x in seen]
            else:
                self._run(self.teacher, images, self._watch(wanted, calls))
        if len(seen) != len(wanted):
            raise ConversionError(
                f"{self.name} is called {len(seen)} times, its convolution in the teacher {len(wanted)} times"
            )
        return [(x, y.to(x.device)) for x, y in zip(seen, wanted, strict=True)]

    def _convolved(self, given: Tensor, images: Tensor) -> Tensor:
        try:
            out: Tensor = self.last(given)
        except RuntimeError as error:
            raise _cannot_run(images, error) from error
        return out

    def _watch(self, wanted: list[Tensor], calls: int) -> list[Any]:
        """Hooks that collect what the teacher gives, branch and input of a residual block added."""
        begun: list[Tensor] = []
        handles = []
        if self.plan.branch is not None:
            # y itself, before the branch can work on it in place
            handles.append(self.first.register_forward_pre_hook(lambda _, args: begun.append(args[0].clone())))

        def look(_: nn.Module, args: Any, out: Tensor) -> None:
            wanted.append(out.clone() if self.plan.branch is None else out + begun.pop())
            if len(wanted) == calls:
                raise _Enough

        return [*handles, self.last.register_forward_hook(look)]

    def _run(self, model: nn.Module, images: Tensor, handles: list[Any]) -> None:
        home = next((p.device for p in model.parameters()), images.device)
        try:
            # A model may work on its input in place, and the other one is to see the same.
            model(images.to(home, copy=True))
        except _Enough:
            pass
        except (RuntimeError, AssertionError) as error:
            raise _cannot_run(images, error) from error
        finally:
            for handle in handles:
                handle.remove()

    def _hand_over(self, norms: dict[str, float]) -> None:
        """Give the BatchNorm behind what the layer itself cannot hold."""
        norm, original, fitter = self.norm, self.its_norm, self.fitter
        if norm is None or original is None:
            return
        residual = fitter.residual if isinstance(fitter, NeutralFit) else None
        if residual is not None:
            norms[str(self.plan.batchnorm)] = absorb(norm, residual, fitter.shift, original=original)
        elif isinstance(fitter, NeutralFit) and fitter.absorb:
            # What an earlier start left there is the layer's own again.
            norms[str(self.plan.batchnorm)] = absorb(norm, torch.ones(self.layer.out_channels), original=original)
        elif fitter.shift is not None:
            # It normalises y − μ: adding to y is taking away from μ.
            mean, its = norm.running_mean, original.running_mean
            assert isinstance(mean, Tensor)
            assert isinstance(its, Tensor)
            mean.copy_(its.to(mean.device) - fitter.shift.to(mean.device))

    def _shift(self) -> Tensor | None:
        """What is added to the layer's output behind it."""
        return None if isinstance(self.fitter, NeutralFit) or self.norm is None else self.fitter.shift

    def _saturation(self) -> str:
        kernel = getattr(self.layer, "saturation", None)
        if kernel is None:
            return ""
        given, _ = next(self.pairs(local=True))
        with torch.no_grad():
            return kernel(given) or ""

    def _match_statistics(self) -> None:
        """Move the BatchNorm's statistics by what the layer's output has moved by, on the same images."""
        norm, original = self.norm, self.its_norm
        if norm is None or original is None:
            return
        moments = Moments()
        for given, target in self.pairs():
            with torch.no_grad():
                moments.add(self.layer(given), target)
        (mean_x, var_x), (mean_y, var_y) = moments.statistics()
        mean, var = norm.running_mean, norm.running_var
        its_mean, its_var = original.running_mean, original.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        assert isinstance(its_mean, Tensor)
        assert isinstance(its_var, Tensor)
        ratio = torch.where(var_y > 0, var_x / var_y.clamp_min(1e-30), 1.0)
        # So that (mean − μ) / σ of these images stays what it was.
        mean.copy_(mean_x - (mean_y - its_mean.double()) * ratio.sqrt())
        var.copy_(its_var.double() * ratio)


def _cannot_run(images: Tensor, error: BaseException) -> DataError:
    return DataError(f"the model cannot run images of shape {tuple(images.shape)}: {error}")


def _norm(model: nn.Module, name: str | None) -> nn.Module | None:
    norm = None if name is None else dict(model.named_modules(remove_duplicate=False)).get(name)
    return norm if norm is not None and can_absorb(norm) else None
