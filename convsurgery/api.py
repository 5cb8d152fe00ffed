"""The public functions, all in one place; each is documented where it is defined or here."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsurgery import models as models  # makes their names known to timm
from convsurgery import zoo
from convsurgery.adapt.evaluation import evaluate
from convsurgery.adapt.finetuning import finetune
from convsurgery.adapt.fitting import Fit, fit_layers
from convsurgery.errors import ConversionError, ModelError
from convsurgery.geometry import Block
from convsurgery.graph import Template, copy_model, observe
from convsurgery.operators import Start, list_operators
from convsurgery.rules import PatternSelector, RulesLike, as_rules, list_selectors, parse_selector
from convsurgery.surgery import (
    Entry,
    Plan,
    apply,
    apply_,
    blends,
    finish_blend,
    fuse,
    load,
    make_plan,
    record,
    save,
    set_blend,
    unwrap,
)
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
    "pattern",
    "plan",
    "record",
    "save",
    "set_blend",
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
    on_layer: Callable[[str, float], object] | None = None,
) -> nn.Module:
    """A copy of ``model`` with the convolutions that ``rule`` takes replaced; the model itself stays as it is.

    The copy keeps class, API, dtype, device, train flag and ``requires_grad``; by default it still predicts what the
    model predicted, where the operator has a neutral setting.

    Args:
        model, rule, example_inputs, start: as for :func:`plan`.
        calibration: images (a tensor, or an iterable of batches that can be repeated, such as a DataLoader). Operators
            that can be fitted to data are, on the convolutions' outputs; those that start by ``copy`` get a
            per-channel affine.
        on_layer: called with every fitted layer's name and the relative error left there.

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
    options: dict[str, Any] = {"start": start, "calibration": calibration, "on_layer": on_layer}
    return convert_(copy_model(model), rule, example_inputs=example_inputs, **options)


def convert_(
    model: nn.Module,
    rule: RulesLike,
    *,
    example_inputs: Inputs = None,
    start: str | Start | None = None,
    calibration: Any = None,
    on_layer: Callable[[str, float], object] | None = None,
) -> nn.Module:
    """As :func:`convert`, in place: ``model`` itself is changed and returned; on an error it is as it was.

    The Parameter objects are kept, so that an optimiser made before goes on to work. A model that *is* a Conv2d cannot
    become another class: use the return value.
    """
    made = _plan(model, rule, example_inputs, start, data=calibration is not None)
    if made.skips and not made.edits:
        reasons = "\n".join(f"  {entry.site.label}: {entry.reason}" for entry in made.skips[:8])
        if not all(entry.reason == "kept" for entry in made.skips):
            raise ConversionError(f"every convolution that {made.rule} takes has to stay:\n{reasons}")
    if calibration is None:
        _needs_no_data(made)
        return apply_(model, made)
    fitted = _fittable(made.edits)
    if not fitted:
        return apply_(model, made)
    # The fit runs on a copy, so that data that fails leaves the model as it was.
    trial = apply(model, made)
    fit_layers(trial, model, fitted, calibration, on_layer)
    new = apply_(model, made)
    for name, fit in fitted.items():
        for changed in (name, *([fit.batchnorm] if fit.batchnorm else [])):
            new.get_submodule(changed).load_state_dict(trial.get_submodule(changed).state_dict())
    return new


def _fittable(edits: Sequence[Entry]) -> dict[str, Fit]:
    """The operators to fit, in execution order: those that start by fit, or with the weights but not the function."""
    fits: dict[str, Fit] = {}
    for entry in edits:
        start, site, block = entry.start, entry.site, entry.block
        if start is None:
            continue
        ridge = start.value if start.name == "fit" else None
        if block is not None:
            if start.name == "fit":
                fits[_child(block, fits)] = Fit(ridge, branch=(block.members[0], block.members[-1]))
        elif start.name == "fit" or (start.name == "copy" and entry.exactness == "none"):
            fits[site.name] = Fit(ridge, None if site.geometry.bias else site.batchnorm)
    return fits


def _child(block: Block, taken: Mapping[str, Fit]) -> str:
    """The name that the module in a block's place got under the block's owner."""
    names = (f"{block.owner}.{block.pattern}{f'_{i}' if i else ''}".lstrip(".") for i in itertools.count())
    return next(name for name in names if name not in taken)


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
    batches: Any,
    *,
    teacher: nn.Module,
    on_layer: Callable[[str, float], object] | None = None,
) -> dict[str, float]:
    """Fit what has a closed form to the teacher's convolutions; no training.

    Layer by layer in execution order, in float64, streaming; ``model`` is changed in place. Operators that start by
    ``fit`` get their best weights, kervolutions that started by ``copy`` a per-channel affine. What :func:`convert`
    does with ``calibration=``, for a model converted before.

    Args:
        model: a converted model.
        batches: images, as for :func:`convert`.
        teacher: the original model.
        on_layer: called with every layer's name and error when it is done.

    Returns:
        The relative error left at each layer, √(unexplained over total variance), channels averaged.

    Raises:
        ConversionError: when no operator of the model can be fitted, or the teacher is another model.
        DataError: for data that holds nothing.
    """
    done = record(model)
    fitted = _fittable(done.edits if done else ())
    if not fitted:
        raise ConversionError("no operator of this model started by fit or copy: there is nothing to fit")
    return fit_layers(model, teacher, fitted, batches, on_layer)


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
