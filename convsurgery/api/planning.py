"""What would be done to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsurgery import zoo
from convsurgery.adapt.growth import IMAGES, growth_notes
from convsurgery.adapt.images import calibration_images
from convsurgery.errors import ModelError
from convsurgery.graph import Observation, Template, as_arguments, observe
from convsurgery.operators import Start
from convsurgery.plain import declared
from convsurgery.rules import PatternSelector, Rules, RulesLike, as_rules, parse_selector
from convsurgery.surgery import Plan, make_plan, unwrap, weights_of

__all__ = ["Inputs", "View", "inputs_for", "look", "pattern", "plan"]

Inputs = Tensor | Sequence[Any] | Mapping[str, Any] | None


def plan(
    model: nn.Module | str,
    rule: RulesLike,
    *,
    example_inputs: Inputs = None,
    start: str | Start | None = None,
    calibration: Any = None,
) -> Plan:
    """What :func:`convert` would do; nothing is edited and no weight is touched.

    Args:
        model: a model, or a timm or ``torchvision/`` name, which is built without allocating its weights.
        rule: as text, ``"first-conv->kerv-poly"``, or as objects: see ``docs/rules.md``.
        example_inputs: a tensor, the forward's positional arguments, or a mapping of arguments by keyword; by default
            one image of the model's own size, or what torchvision's detection, video and optical flow models take.
        start: how new operators begin whose rule does not say it by ``by``: ``neutral(eps)``, ``fit``, ``blend``,
            ``copy``, ``project`` or ``random``; each operator's default when absent. See ``docs/starts.md``.
        calibration: images, as for :func:`convert`: operators that can be fitted then are by default, and the warning
            of growth looks at the model's own activations.

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
    built = zoo.create_model(model, device="meta") if isinstance(model, str) else model
    view = look(built, example_inputs)
    made = view.plan(as_rules(rule), start, data=calibration is not None)
    images = None if calibration is None else calibration_images(calibration, built, images=IMAGES)
    notes = growth_notes(built, made, images)
    return dataclasses.replace(made, notes=(*made.notes, *notes)) if notes else made


@dataclasses.dataclass(frozen=True)
class View:
    """A model as planning sees it."""

    label: str
    params: int
    seen: Observation
    weights: zoo.Origin

    def plan(self, rules: Rules, start: str | Start | None, *, data: bool) -> Plan:
        begin = None if start is None else Start.parse(start)
        made = make_plan(self.label, self.params, self.seen, rules, begin, data=data)
        return dataclasses.replace(made, weights=str(self.weights))


def look(model: nn.Module, example_inputs: Inputs = None) -> View:
    """Observe a model; ModelError for one that is wrapped."""
    if unwrap(model) is not model:
        wrapper = type(model).__name__
        raise ModelError(f"{wrapper} wraps the model: convert the model itself, then compile or parallelise it")
    params = sum(p.numel() for p in model.parameters() if p.requires_grad and not is_lazy(p))
    return View(_label(model), params, observe(model, inputs_for(model, example_inputs)), weights_of(model))


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


def _label(model: nn.Module) -> str:
    base = getattr(model, "_convsurgery_base", None)
    cfg = declared(model)
    return str(base.name if base is not None else cfg.get("architecture") or type(model).__name__)


def inputs_for(model: nn.Module, example: Inputs) -> tuple[Any, ...]:
    """The forward's arguments: those given, or one image of the model's own size."""
    return zoo.example_inputs(model) if example is None else as_arguments(example)
