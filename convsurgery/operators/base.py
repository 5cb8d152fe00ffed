"""What every operator shares: its config, the registry, starts, cost, and its ONNX meaning.

An operator is one frozen config dataclass, registered under the name that rules use. Its fields are the rule's
arguments; from the registry come rule names, command-line help, the docs table and the table of tests.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from convsurgery.errors import ArgumentError, ConvSurgeryError, nearest
from convsurgery.geometry import Block, Cost, Site
from convsurgery.operators.start import Start
from convsurgery.rules import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convsurgery.operators.onnx import OnnxFunction

__all__ = [
    "Built",
    "Fitter",
    "OperatorConfig",
    "Start",
    "bind",
    "list_operators",
    "operator",
    "option",
    "register_operator",
]

ENTRY_POINTS = "convsurgery.operators"

#: words that mean something else in a rule
_RESERVED = ("keep", "auto")

_registry: dict[str, type[OperatorConfig]] = {}
_entry_points_loaded = False

Config = TypeVar("Config", bound="type[OperatorConfig]")


def option(
    default: Any,
    help: str,
    *,
    kind: type | tuple[type, ...],
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: Sequence[object] = (),
) -> Any:
    """A field of an operator config: default, one line of help, and what is legal.

    ``kind`` is the type (an int passes as a float, a bool never as a number), ``least`` an inclusive and ``above`` an
    exclusive lower bound, ``most`` an inclusive upper one, ``choices`` further legal values outside ``kind``.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # Where absence is the default, it need not be told as a choice.
    told = tuple(choice for choice in choices if choice is not None or default is not None)
    bounds = {"least": least, "above": above, "most": most}
    metadata = {"help": help, "kinds": kinds, **bounds, "choices": tuple(choices), "told": told}
    return dataclasses.field(default=default, metadata=metadata)


def _legal(metadata: Mapping[str, Any]) -> str:
    words = []
    for kind in metadata["kinds"]:
        word = {int: "an integer", float: "a number", bool: "true or false", str: "a word"}[kind]
        least, most = metadata["least"], metadata["most"]
        if least is not None and most is not None and kind is not bool:
            word += f" from {least:g} to {most:g}"
        elif least is not None and kind is not bool:
            word += f" >= {least:g}"
        if metadata["above"] is not None and kind is not bool:
            word += f" > {metadata['above']:g}"
        words.append(word)
    words += [str(choice).lower() for choice in metadata["told"]]
    return " or ".join(words)


def _accept(name: str, value: Any, metadata: Mapping[str, Any]) -> Any:
    if any(value is choice or (type(value) is type(choice) and value == choice) for choice in metadata["choices"]):
        return value
    for kind in metadata["kinds"]:
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            continue
        number = value if kind in (int, float) else None
        if number is not None and not (number == number and abs(number) != float("inf")):
            break
        if metadata["least"] is not None and number is not None and number < metadata["least"]:
            break
        if metadata["above"] is not None and number is not None and number <= metadata["above"]:
            break
        if metadata["most"] is not None and number is not None and number > metadata["most"]:
            break
        return value
    raise ArgumentError(name, f"{name} wants {_legal(metadata)}, not {str(value).lower()}")


class Fitter(Protocol):
    """Fits one layer to what the convolution gave, batch by batch; a layer that can be fitted has ``fitter(conv)``.

    Attributes:
        shift: in the end what has to be added to the layer's output, (C_out,), where it has no bias; else None.
        local: whether the layer is to be compared with its convolution on the layer's own input, instead of with what
            the convolution gives in the original model.
        note: what the user should know of this fit, such as a penalty that had to be raised; "" for nothing.
    """

    shift: Tensor | None
    local: bool
    note: str

    def add(self, input: Tensor, output: Tensor, target: Tensor) -> None:
        """One batch: the layer's input, its output as it is now, and what the convolution gives.

        The input is as :meth:`OperatorLayer.prepared` gives it, but for ``local`` fits: those get what the layer does.
        """

    def finish(self) -> float | None:
        """End of the data: the relative error that is left, or None when it wants to see all of it once more."""


@dataclass(frozen=True)
class Built:
    """A new module, and what it leaves for the BatchNorm behind it to absorb.

    Attributes:
        module: computes ``residual * conv(x)`` for each output channel, where the start keeps the convolution.
        residual: float64, (C_out,), or None where there is nothing to absorb.
        rest: what stays in the place of a chain's last layer, behind ``module``; nothing when None.
    """

    module: nn.Module
    residual: Any = None
    rest: nn.Module | None = None


@dataclass(frozen=True)
class OperatorConfig:
    """Base of all operator configs. Subclasses are frozen dataclasses made of :func:`option` fields.

    Class attributes to give: ``summary`` (one line), ``formula``, ``source`` (paper and equation), ``starts`` (start
    name to how it keeps the convolution: "exact", "approximate", "fitted" to data or "none"; the first that
    :meth:`refuses_start` lets pass is the default, but for "fit", which needs data; registering adds "blend" where no
    copy is exact), ``patterns`` (structural patterns
    whose place it takes as a whole, ``"*"`` for any; empty for an operator that takes the place of one convolution),
    ``leaves_gain`` (whether a neutral start may leave a per-channel gain to a BatchNorm behind), ``onnx`` (its node),
    ``more_onnx`` (nodes of the other layers that it builds).
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    starts: ClassVar[Mapping[str, str]] = {"copy": "none"}
    patterns: ClassVar[tuple[str, ...]] = ()
    leaves_gain: ClassVar[bool] = True
    onnx: ClassVar[OnnxFunction | None] = None
    more_onnx: ClassVar[tuple[OnnxFunction, ...]] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _accept(field.name, getattr(self, field.name), field.metadata))
        self.validate()

    def validate(self) -> None:
        """Checks beyond the range of one field; raise :class:`ArgumentError`."""

    def refuses(self, site: Site) -> str | None:
        """Why this operator cannot stand at ``site``, or None when it can."""
        return None

    def takes(self) -> tuple[str, ...]:
        """The patterns whose place this config takes; empty where it takes the place of one convolution."""
        return self.patterns

    def note(self, site: Site) -> str | None:
        """What of the convolution falls away at ``site``, in a few words for the plan; None when nothing does."""
        return None

    def refuses_start(self, start: str, site: Site | None = None) -> str | None:
        """Why this config cannot begin with ``start`` (at ``site``) although the operator has it, or None."""
        return None

    def keeps(self, start: Start) -> str:
        """How ``start`` keeps the convolution: as ``starts`` says of its name, unless its number changes that."""
        return self.starts[start.name]

    def start_for(self, wanted: Start | None, site: Site | None = None, *, data: bool = False) -> Start:
        """The start to use: the one wanted, else the first of ``starts`` that this config allows.

        Args:
            wanted: None for the operator's choice.
            site: where; None leaves open what depends on the place.
            data: whether there is data to fit to. Without it ``fit`` is used only where it is wanted.

        Raises:
            ArgumentError: for a start that the operator has not, or that this config or site does not allow.
        """
        if wanted is None:
            free = [name for name in self.starts if self.refuses_start(name, site) is None]
            return Start("fit" if data and "fit" in free else next(name for name in free if name != "fit"))
        if wanted.name not in self.starts:
            raise ArgumentError("start", f"{self.name} has no start {wanted.name!r}", nearest(wanted.name, self.starts))
        if reason := self.refuses_start(wanted.name, site):
            raise ArgumentError("start", f"{self} cannot start by {wanted.name}: {reason}")
        return wanted

    def blended_start(self, site: Site | None = None) -> Start:
        """How the operator itself begins beside the convolution that it is blended with: in a form of its own."""
        free = [name for name in self.starts if self.refuses_start(name, site) is None]
        return Start(next(name for name in ("fit", "copy", "project", "random", "neutral") if name in free))

    def cost(self, site: Site) -> Cost:
        """Trainable parameters and multiply-accumulates for one image at this site."""
        return site.cost

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        """The module that takes ``conv``'s place; the Parameter objects of ``conv`` are reused.

        Args:
            conv: the convolution to replace; left as it is.
            start: a start that :meth:`start_for` returned. Building needs no data: what ``fit`` finds is filled in
                afterwards, by the layer's ``fitter(conv)``.
            absorb: whether a BatchNorm follows that can take a per-channel gain; without a bias only.
            site: where ``conv`` stands, with the sizes of its images; operators that do not need it build without.
        """
        raise NotImplementedError

    def refuses_block(self, block: Block, sites: Sequence[Site]) -> str | None:
        """Why this operator cannot take the place of ``block`` with the convolutions ``sites``, or None."""
        return None

    def block_cost(self, block: Block, sites: Sequence[Site]) -> Cost:
        """Parameters and multiply-accumulates for one image when it has taken the place of ``block``."""
        return Cost(block.params, block.macs)

    def build_block(self, module: nn.Module, block: Block, start: Start) -> Built:
        """The module that takes the place of a whole pattern; for operators that name ``patterns``.

        Args:
            module: computes the block from its one input, made of the model's own layers: an ``nn.Sequential`` of them
                for a chain, else an ``fx.GraphModule``. Left as it is; its layers may be reused.
            block: what was matched.
            start: a start that :meth:`start_for` returned.
        """
        raise NotImplementedError

    def to_target(self) -> Target:
        """This config as the right side of a rule; arguments at their defaults are left out."""
        changed = [
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return Target(self.name, tuple(changed))

    def __str__(self) -> str:
        return str(self.to_target())


def register_operator(name: str) -> Callable[[Config], Config]:
    """Class decorator that makes a config known to rules under ``name``; a second of the same name raises."""

    def decorate(cls: Config) -> Config:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or name in _RESERVED:
            reserved = " or ".join(map(repr, _RESERVED))
            raise ConvSurgeryError(
                f"{name!r} cannot name an operator: lower-case letters, digits and '-', not {reserved}"
            )
        if _registry.get(name, cls) is not cls:
            raise ConvSurgeryError(f"operator {name!r} is already registered by {_registry[name].__qualname__}")
        cls.name = name
        if cls.starts.get("copy") != "exact":
            # Beside its convolution any operator can stand.
            cls.starts = {**cls.starts, "blend": "exact"}
        _registry[name] = cls
        return cls

    return decorate


def _load_entry_points() -> None:
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            raise ConvSurgeryError(f"the operators of package entry {entry.value!r} do not load: {error}") from error


def operator(name: str) -> type[OperatorConfig]:
    """The config class registered under ``name``; KeyError when there is none."""
    _load_entry_points()
    return _registry[name]


def list_operators() -> list[str]:
    """Names of all registered operators, in alphabetical order."""
    _load_entry_points()
    return sorted(_registry)


def bind(target: Target) -> OperatorConfig:
    """The config a rule's target names; errors point at the operator or argument in the rule text."""
    _load_entry_points()
    if target.name not in _registry:
        raise target.error(f"unknown operator {target.name!r}", hint=nearest(target.name, [*_registry, "keep"]))
    cls = _registry[target.name]
    known = {field.name for field in dataclasses.fields(cls)}
    for key, _ in target.args:
        if key not in known:
            hint = nearest(key, known) if known else f"{target.name} takes no arguments"
            raise target.error(f"{target.name} has no argument {key!r}", arg=key, hint=hint)
    try:
        return cls(**dict(target.args))
    except ArgumentError as error:
        raise target.error(error.message, arg=error.argument, hint=error.hint) from None
