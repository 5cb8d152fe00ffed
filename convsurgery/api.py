"""The public functions, all in one place; each is documented where it is defined or here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsurgery import models as models  # makes their names known to timm
from convsurgery import zoo
from convsurgery.adapt.calibration import Calibration, fits_of, run_fits
from convsurgery.adapt.evaluation import evaluate
from convsurgery.adapt.finetuning import finetune
from convsurgery.adapt.fitting import Fit, FitOptions, LayerFit
from convsurgery.adapt.images import calibration_images
from convsurgery.errors import ConversionError, ModelError
from convsurgery.graph import Template, observe
from convsurgery.operators import Start, list_operators
from convsurgery.rules import PatternSelector, RulesLike, as_rules, list_selectors, parse_selector
from convsurgery.surgery import (
    Plan,
    apply,
    apply_,
    blends,
    finish_blend,
    fuse,
    load,
    make_plan,
    nonlinearity,
    record,
    save,
    set_blend,
    set_nonlinearity,
    unwrap,
)
from convsurgery.surgery.record import set_record
from convsurgery.zoo import create_model, load_checkpoint

if TYPE_CHECKING:
    from convsurgery.export import Parity

__all__ = [
    "apply",
    "blends",
    "calibrate",
    "convert",
    "convert_",
    "create_model",
    "evaluate",
    "export_onnx",
    "finetune",
    "finish_blend",
    "fuse",
    "list_operators",
    "list_selectors",
    "load",
    "load_checkpoint",
    "nonlinearity",
    "pattern",
    "plan",
    "record",
    "save",
    "set_blend",
    "set_nonlinearity",
    "verify_onnx",
]

Inputs = Tensor | Sequence[Any] | None


def plan(
    model: nn.Module | str, rule: RulesLike, *, example_inputs: Inputs = None, start: str | Start | None = None
) -> Plan:
    """What :func:`convert` would do; nothing is edited and no weight is touched.

    Args:
        model: a model, or a timm or ``torchvision/`` name, which is built without allocating its weights.
        rule: as text, ``"first-conv->kerv-poly"``, or as objects: see ``docs/rules.md``.
        example_inputs: a tensor, or the forward's positional arguments; by default one image of the model's own size,
            or what torchvision's detection, video and optical flow models take.
        start: how the new operators begin: ``neutral(eps)``, ``copy``, ``fit``, ``project`` or ``random``; each
            operator's default when absent.

    Returns:
        A plan that prints as a table.

    Raises:
        RuleError: for a rule that cannot be read or names what does not exist.
        NoMatchError: when no convolution matches; lists near misses.
        ConversionError: when a convolution that the rule names alone cannot be replaced.
        ModelError: for an unknown name, a model that does not run on the example inputs, or one that is compiled or
            wrapped for several devices already.

    Example:
        >>> import convsurgery as cs
        >>> len(cs.plan("resnet18", "conv[k=3, s=1]->kerv-poly(degree=2)").edits)
        13
    """
    return _plan(model, rule, example_inputs, start)


def _plan(
    model: nn.Module | str, rule: RulesLike, example_inputs: Inputs, start: str | Start | None, *, data: bool = False
) -> Plan:
    rules = as_rules(rule)
    begin = None if start is None else Start.parse(start)
    built = zoo.create_model(model, device="meta") if isinstance(model, str) else model
    if unwrap(built) is not built:
        wrapper = type(built).__name__
        raise ModelError(f"{wrapper} wraps the model: convert the model itself, then compile or parallelise it")
    inputs = _inputs(built, example_inputs)
    params = sum(p.numel() for p in built.parameters() if p.requires_grad and not is_lazy(p))
    return make_plan(_label(built), params, observe(built, inputs), rules, begin, data=data)


def pattern(code: nn.Module | Callable[..., Any], tests: str = "", *, name: str | None = None) -> PatternSelector:
    """A structural pattern of one's own, to be used where a selector is: ``[(cs.pattern(code), "block")]``.

    Args:
        code: layers connected as they are to be found: a module, whose layers count by class and not by options, or a
            function of a tensor and of layers, annotated with their classes.
        tests: asked of the first convolution of a match, as in rules: ``"k=3, name=layer2.*"``.
        name: for printing; the class's or function's name by default.

    Raises:
        RuleError: when the code does not trace (the text names the line), takes or returns several tensors, or has no
            Conv2d; when a test cannot be read.

    Example:
        >>> import convsurgery as cs
        >>> from torch import nn
        >>> def end(x, conv: nn.Conv2d, norm: nn.BatchNorm2d, act: nn.ReLU):
        ...     return act(norm(conv(x)))
        >>> len(cs.plan("resnet18", [(cs.pattern(end), "block")]).edits)
        9
    """
    read = parse_selector(f"conv[{tests}]").tests if tests.strip() else ()
    return PatternSelector(Template(code, name), read)


def convert(
    model: nn.Module,
    rule: RulesLike,
    *,
    example_inputs: Inputs = None,
    start: str | Start | None = None,
    calibration: Any = None,
    on_layer: Callable[[LayerFit], object] | None = None,
) -> nn.Module:
    """A copy of ``model`` with the convolutions that ``rule`` takes replaced; the model itself stays as it is.

    The copy keeps class, API, dtype, device, train flag and ``requires_grad``; by default it still predicts what the
    model predicted, where the operator has a neutral setting.

    Args:
        model, rule, example_inputs, start: as for :func:`plan`.
        calibration: images, as for :func:`calibrate`. Operators are fitted to the convolutions' outputs as far as they
            can be.
        on_layer: called with a :class:`LayerFit` for every layer that was fitted.

    Raises:
        As :func:`plan`; ConversionError also when a weight is not finite, or when every site the rule takes has to be
        skipped.

    Example:
        >>> import timm, torch, convsurgery as cs
        >>> model = timm.create_model("resnet18").eval()
        >>> new, x = cs.convert(model, "all-conv->kerv-linear"), torch.randn(1, 3, 64, 64)
        >>> torch.equal(new(x), model(x))
        True
    """
    made = _edits(model, rule, example_inputs, start, data=calibration is not None)
    fits = fits_of(made.edits)
    if calibration is None or not fits:
        return apply(model, made)
    return _fitted(model, made, fits, calibration, on_layer)


def convert_(
    model: nn.Module,
    rule: RulesLike,
    *,
    example_inputs: Inputs = None,
    start: str | Start | None = None,
    calibration: Any = None,
    on_layer: Callable[[LayerFit], object] | None = None,
) -> nn.Module:
    """As :func:`convert`, in place: ``model`` itself is changed and returned; on an error it is as it was.

    The Parameter objects are kept, so that an optimiser made before goes on to work. A model that *is* a Conv2d cannot
    become another class: use the return value.
    """
    made = _edits(model, rule, example_inputs, start, data=calibration is not None)
    fits = fits_of(made.edits)
    if calibration is None or not fits:
        return apply_(model, made)
    # The fit runs on a copy, so that data that fails leaves the model as it was.
    trial = _fitted(model, made, fits, calibration, on_layer)
    new = apply_(model, made)
    theirs = dict(trial.named_modules(remove_duplicate=False))
    for name, fit in fits.items():
        new.get_submodule(name).load_state_dict(theirs[name].state_dict())
        if fit.batchnorm:
            norm = new.get_submodule(fit.batchnorm)
            norm.load_state_dict(theirs[fit.batchnorm].state_dict())
            norm.eps = theirs[fit.batchnorm].eps
    done, its = record(new), record(trial)
    assert done is not None
    assert its is not None
    set_record(new, dataclasses.replace(done, norms=its.norms))
    return new


def _edits(model: nn.Module, rule: RulesLike, example_inputs: Inputs, start: str | Start | None, *, data: bool) -> Plan:
    """The plan to carry out; raises where there would be nothing to do, or data are missing."""
    made = _plan(model, rule, example_inputs, start, data=data)
    if made.skips and not made.edits:
        reasons = "\n".join(f"  {entry.site.label}: {entry.reason}" for entry in made.skips[:8])
        if not all(entry.reason == "kept" for entry in made.skips):
            raise ConversionError(f"every convolution that {made.rule} takes has to stay:\n{reasons}")
    if not data:
        _needs_no_data(made)
    return made


def _fitted(
    model: nn.Module,
    made: Plan,
    fits: Mapping[str, Fit],
    calibration: Any,
    on_layer: Callable[[LayerFit], object] | None,
) -> nn.Module:
    """A converted copy of ``model``, fitted to it."""
    trial = apply(model, made)
    images = calibration_images(calibration, model)
    run_fits(trial, model, fits, images, FitOptions(), progress=False, on_layer=on_layer)
    return trial


def _needs_no_data(made: Plan) -> None:
    """Raise for operators that were asked to start by fit where there is nothing to fit to."""
    entry = next((e for e in made.edits if e.start is not None and e.start.name == "fit"), None)
    if entry is None or entry.config is None:
        return
    names = [name for name in entry.config.starts if name != "fit"]
    without = [name for name in names if entry.config.refuses_start(name, entry.site) is None]
    raise ConversionError(
        f"{entry.site.label}: {entry.config} starts by fit, which needs images: give calibration=images. "
        f"Without data it starts by {' or '.join(without)}"
    )


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    teacher: nn.Module,
    images: int | None = None,
    target: float | None = None,
    batchnorm: bool = False,
    steps: int = 0,
    progress: bool = True,
    on_layer: Callable[[LayerFit], object] | None = None,
) -> Calibration:
    """Fit what has a closed form to the teacher's convolutions; no training.

    Layer by layer in execution order, in float64, streaming: each pass over the images runs no further than the layer
    it is for, and keeps sums, not activations. ``model`` is changed in place. Layers that start by ``neutral`` get the
    largest ε that meets ``target``, unless the rule gave one, and the best gain and offset for it; those that start by
    ``fit`` their best weights; kervolutions that start by ``copy``, alone or in a blend, the best gain and offset. With
    ``steps`` fitted layers are then improved by gradient, each on its own.

    What :func:`convert` does with ``calibration=``, for a model converted before, and with more choices.

    Args:
        model: a converted model.
        data: a tensor of images (N, C, H, W), a DataLoader or another iterable of batches that can be repeated, a
            :class:`DataSplit` or a folder of image files. 64 images are enough for most layers.
        teacher: the original model; not changed.
        images: how many to use at most; all when None.
        target: relative error that a layer on the neutral start may have; 1e-3 when None.
        batchnorm: give BatchNorms behind fitted layers the mean and variance they now meet, relative to the teacher's.
        steps: of gradient descent on each fitted layer; a few hundred help where the closed form leaves much.
        progress: a bar, where standard error is a terminal.
        on_layer: called with every :class:`LayerFit` when it is done.

    Returns:
        A mapping from names to the relative error left at each layer, √(mean square over variance), channels averaged;
        prints as a table with the errors before, and what was found.

    Raises:
        ConversionError: when no operator of the model can be fitted, or the teacher is another model.
        DataError: for data that is empty, of the wrong size or type, or not finite. Warns when images look
            un-normalised.
    """
    done = record(model)
    fits = fits_of(done.edits if done else ())
    if not fits:
        raise ConversionError(
            "no operator of this model starts by neutral, fit, copy or blend: there is nothing to fit"
        )
    source = calibration_images(data, model, images=images)
    options = FitOptions(target, batchnorm, steps)
    return run_fits(model, teacher, fits, source, options, progress=progress, on_layer=on_layer)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    inline: bool = False,
    opset: int | None = None,
    verify: bool = True,
    **options: Any,
) -> Parity | None:
    """Write ``model`` as ONNX, verified in ONNX Runtime before the file appears.

    Args:
        model: float32; not changed.
        path: of the file to write; nothing is left there when anything fails.
        inline: standard operators only, instead of one node per operator with its body inside the file.
        opset: of the standard operators, 18 to 23; 18 when not given.
        verify: compare with PyTorch on batches of 1, 2 and 5.
        **options: ``example_inputs``, ``dynamic_batch``, ``tolerance``, ``data``; see
            :func:`convsurgery.export.export_onnx`.

    Returns:
        What was measured, or None without ``verify``.

    Raises:
        ExportError: when the model cannot be exported or the file not be written.
        ParityError: when the file computes something else; names the first node that differs.
    """
    from convsurgery.export import export_onnx as write

    return write(model, path, inline=inline, opset=opset, verify=verify, **options)


def verify_onnx(path: str | os.PathLike[str], model: nn.Module, **options: Any) -> Parity:
    """Compare an ONNX file with the model it was made from, in ONNX Runtime.

    Args:
        path: the file.
        model: the PyTorch model; not changed.
        **options: ``example_inputs``, ``batches``, ``tolerance``, ``data``; see :func:`convsurgery.export.verify_onnx`.

    Raises:
        ExportError: when the file cannot be read or run.
        ParityError: when it computes something else; names the first node that differs.
    """
    from convsurgery.export import verify_onnx as check

    return check(path, model, **options)


def _label(model: nn.Module) -> str:
    base = getattr(model, "_convsurgery_base", None)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(base.name if base is not None else cfg.get("architecture") or type(model).__name__)


def _inputs(model: nn.Module, example: Inputs) -> tuple[Any, ...]:
    if isinstance(example, Tensor):
        return (example,)
    return zoo.example_inputs(model) if example is None else tuple(example)
