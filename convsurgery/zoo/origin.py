"""Where a model's weights come from, as far as that can be known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convsurgery.plain import declared

__all__ = ["Origin", "note_origin", "origin_of"]

_HEAD = ", random head"
_ATTRIBUTE = "_convsurgery_origin"
#: values of each tensor that are kept, to see whether the weights are still those that were noted
_SAMPLE = 8


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Attributes:
        text: ``random``, ``a1_in1k`` (timm's tag), ``checkpoint FILE``, ``unknown``, ..., as tables print it.
        random: they are as they were initialised; whatever is measured on them says nothing of a trained model.
        new_head: the classifier alone is.
    """

    text: str
    random: bool = False
    new_head: bool = False

    def __str__(self) -> str:
        return self.text + (_HEAD if self.new_head else "")

    @classmethod
    def parse(cls, text: str) -> Origin:
        """The origin whose text, as a plan or a saved model keeps it, this is."""
        return cls(text.removesuffix(_HEAD), text == "random", text.endswith(_HEAD))


@dataclass(frozen=True)
class _Noted:
    """An origin, and samples of the tensors that it is about; those that a conversion leaves alone are ``fixed``."""

    origin: Origin
    samples: Mapping[str, tuple[Tensor, tuple[int, ...], bool]] = field(repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Noted:
        return self


def note_origin(model: nn.Module, origin: Origin) -> None:
    """Remember where the weights that ``model`` has now come from."""
    samples = {} if _is_meta(model) else {name: (_sample(t), tuple(t.shape), fixed) for name, t, fixed in _all(model)}
    object.__setattr__(model, _ATTRIBUTE, _Noted(origin, samples))


def origin_of(model: nn.Module, *, before: Origin | None = None) -> Origin:
    """Where the weights of ``model`` come from.

    What :func:`note_origin` remembers holds while the tensors that a conversion leaves alone have the values they had
    then; afterwards it is said that they were changed. Of other models it can be seen whether their normalisation is
    as it was initialised; a model is not said to be trained on more than that, and a tag that it carries only names
    the configuration it was built by.

    Args:
        model: any model.
        before: what was known otherwise, for a model without a note, such as by the plan it was converted by.
    """
    if _is_meta(model):
        return Origin("not loaded")
    noted = getattr(model, _ATTRIBUTE, None)
    if isinstance(noted, _Noted):
        return noted.origin if _unchanged(model, noted) else _changed(noted.origin)
    found = _evidence(model)
    if before is not None:
        return _changed(before) if before.random and found == "trained" else before
    if found == "initialised":
        return Origin("random", random=True)
    tag = declared(model).get("tag")
    if found == "trained":
        return Origin("unknown (not as initialised" + (f", timm's tag is {tag})" if tag else ")"))
    return Origin("unknown")


def _changed(origin: Origin) -> Origin:
    if origin.text.endswith("changed since"):
        return origin
    return Origin(f"{'random at first' if origin.random else origin.text}, changed since")


def _is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _all(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Every parameter, and whether a conversion or a forward in train mode leaves it as it is."""
    for prefix, module in model.named_modules():
        fixed = not isinstance(module, nn.modules.conv._ConvNd) and not _is_norm(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                yield f"{prefix}.{name}", parameter.detach(), fixed


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE].to("cpu", copy=True)


def _unchanged(model: nn.Module, noted: _Noted) -> bool:
    now = {name: tensor for name, tensor, _ in _all(model)}
    fixed = {name: held for name, held in noted.samples.items() if held[2]}
    if fixed:
        # A classifier that was put there afterwards lacks, or has another shape.
        return all(
            name in now and tuple(now[name].shape) == shape and _same(now[name], values)
            for name, (values, shape, _) in fixed.items()
        )
    common = [name for name, held in noted.samples.items() if name in now and tuple(now[name].shape) == held[1]]
    return not common or any(_same(now[name], noted.samples[name][0]) for name in common)


def _same(tensor: Tensor, values: Tensor) -> bool:
    """Whether a tensor has the noted values, also after it went through a smaller dtype."""
    found = _sample(tensor)
    if values.dtype == found.dtype and torch.equal(found, values):
        return True
    through = (found.dtype, torch.float16, torch.bfloat16)
    return any(torch.equal(found, values.to(dtype).to(found.dtype)) for dtype in through)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _evidence(model: nn.Module) -> str:
    """What the normalisation layers tell: "initialised", "trained", or "unclear" where there are none.

    Running statistics come first, since some networks draw their gains at random; where only they have moved, a forward
    in train mode was enough.
    """
    gains, statistics = [], []
    for module in model.modules():
        if not _is_norm(module):
            continue
        own = {**module._parameters, **module._buffers}
        parts = {name: own.get(name) for name in ("weight", "bias", "running_mean", "running_var")}
        held = {name: part for name, part in parts.items() if isinstance(part, Tensor) and part.numel()}
        gains += [
            _is_all(part, *((0.0, 1.0) if name == "weight" else (0.0,)))
            for name, part in held.items()
            if name in ("weight", "bias")
        ]
        statistics += [
            _is_all(part, float(name == "running_var")) for name, part in held.items() if name.startswith("running")
        ]
    if statistics and all(statistics):
        return "initialised"
    if not gains or (statistics and all(gains)):
        return "unclear"
    return "initialised" if all(gains) else "trained"


def _is_all(tensor: Tensor, *values: float) -> bool:
    """Whether every value is the same one of ``values``."""
    return any(bool((tensor == value).all()) for value in values)
