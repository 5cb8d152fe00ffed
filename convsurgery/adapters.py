"""Subclasses of Conv2d that operators can replace: what each does besides convolving, and how the new module keeps it.

A subclass may pad its input at run time (TensorFlow's SAME) and compute the weight it convolves with from the one it
stores (weight standardisation). Its :class:`Adapter` says so. Operators are built from a plain Conv2d with the
effective weight; the module they give then becomes one of a subclass of its class, which pads and computes as the
convolution did.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.errors import ConvSurgeryError, ModelError
from convsurgery.folding import refuse_folding
from convsurgery.geometry import ConvGeometry, Pair, pair

__all__ = ["Adapter", "adapter_for", "pad_same", "register_adapter"]


@torch.fx.wrap  # FX cannot follow sizes through a maximum
def pad_same(x: Tensor, kernel_size: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """Zeros around (…, H, W) so that a window gives ceil(H / stride), ceil(W / stride); the odd one right and below."""
    height, width = (
        # Where the last window ends, less what is there.
        _at_least_0((size + s - 1) // s * s - s + d * (k - 1) + 1 - size)
        for size, k, s, d in zip(x.shape[-2:], kernel_size, stride, dilation, strict=True)
    )
    return F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])


def _at_least_0(amount: Any) -> Any:
    """Also for symbols, which a plain ``max`` would fix, and for the tensors that ``torch.jit.trace`` has as sizes."""
    return amount.clamp(min=0) if isinstance(amount, Tensor) else torch.sym_max(amount, 0)


@dataclass(frozen=True)
class Adapter:
    """How a subclass of ``torch.nn.Conv2d`` differs from it.

    Attributes:
        same: whether it pads its input as :func:`pad_same` does, or the name of its attribute that says whether.
        weight: the effective weight, (C_out, C_in / groups, kh, kw) as the stored one, from the stored one and the
            values of ``extras``; None where they are one. A module-level function, so that modules can be pickled.
        extras: names of the attributes (parameters, buffers, numbers) that ``weight`` takes behind the stored weight.
        prefix: of the new modules' class names where ``weight`` is at work.
        fixed: name of its attribute that pads the input by amounts that do not change, an ``nn.ZeroPad2d`` or an
            ``nn.Identity``.
    """

    same: bool | str = False
    weight: Callable[..., Tensor] | None = None
    extras: tuple[str, ...] = ()
    prefix: str = "Reweighted"
    fixed: str = ""

    def attributes(self, conv: nn.Conv2d) -> frozenset[str]:
        """Names of what ``conv`` holds for this."""
        told = tuple(name for name in (self.same, self.fixed) if isinstance(name, str) and name)
        mine = ("_window", "_amounts", "_extras", *getattr(conv, "_extras", ())) if isinstance(conv, _Adapted) else ()
        return frozenset((*self.extras, *told, *mine))

    def pads(self, conv: nn.Conv2d) -> bool:
        """Whether ``conv`` pads its input at run time."""
        return bool(getattr(conv, self.same)) if isinstance(self.same, str) else self.same

    def amounts(self, conv: nn.Conv2d) -> tuple[int, int, int, int] | None:
        """Zeros that ``conv`` puts (left, right, above, below) its input by itself, in fixed amounts; None for none."""
        if isinstance(conv, _Adapted):
            return getattr(conv, "_amounts", None)
        padding = getattr(getattr(conv, self.fixed), "padding", None) if self.fixed else None
        if padding is None or not any(padding):
            return None
        left, right, top, bottom = padding
        return int(left), int(right), int(top), int(bottom)

    def geometry(self, conv: nn.Conv2d) -> ConvGeometry:
        """The geometry of ``conv``; padding mode "same" where it pads at run time."""
        geometry = ConvGeometry.of(conv)
        amounts = self.amounts(conv)
        if amounts is not None:
            whole = (own + more for own, more in zip(geometry.padding, amounts, strict=True))
            return dataclasses.replace(geometry, padding=tuple(whole))  # type: ignore[arg-type]
        if not self.pads(conv):
            return geometry
        return dataclasses.replace(geometry, padding=(0, 0, 0, 0), padding_mode="same")

    def effective(self, conv: nn.Conv2d) -> Tensor:
        """The weight that ``conv`` convolves with; the very Parameter where it is the stored one."""
        stored = conv._parameters["weight"]
        assert stored is not None
        return stored if self.weight is None else self.weight(stored, *(getattr(conv, name) for name in self.extras))

    def plain(self, conv: nn.Conv2d) -> nn.Conv2d:
        """A Conv2d with the effective weight of ``conv``, its bias Parameter and its options; no run-time padding.

        The weight is a new Parameter, detached, where it is computed, else the Parameter of ``conv`` itself.
        """
        made = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            pair(conv.kernel_size),
            pair(conv.stride),
            0 if self.pads(conv) else conv.padding,  # type: ignore[arg-type]
            pair(conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",  # only its options are wanted
        ).train(conv.training)
        made.bias = conv.bias
        stored = conv._parameters["weight"]
        assert stored is not None
        if self.weight is None:
            made.weight = stored
        else:
            with torch.no_grad():
                made.weight = nn.Parameter(self.effective(conv), requires_grad=stored.requires_grad)
        return made

    def wrap(self, new: nn.Module, conv: nn.Conv2d, plain: nn.Conv2d) -> nn.Module:
        """``new``, built by an operator from ``plain``, as a module that pads and computes its weight as ``conv`` does.

        It is changed in place: its class becomes a subclass of what it was. Where it holds the Parameter of
        ``plain.weight`` as ``weight``, that becomes the stored Parameter of ``conv`` and reading ``weight`` gives the
        effective one; ``extras`` come along, named ``conv_…`` where the operator has that name already. Where the
        operator drew or computed a weight of its own, it stays as it is.
        """
        weighted = self.weight is not None and new._parameters.get("weight") is plain.weight
        kept = self if weighted else dataclasses.replace(self, weight=None, extras=())
        if weighted:
            names = []
            for name in self.extras:
                free = name
                while hasattr(new, free):
                    free = f"conv_{free}"
                if name in conv._buffers:
                    new.register_buffer(free, conv._buffers[name], name not in conv._non_persistent_buffers_set)
                else:
                    setattr(new, free, getattr(conv, name))
                names.append(free)
            new._parameters["weight"] = conv._parameters["weight"]
            new._extras = tuple(names)  # type: ignore[assignment]
        window = (pair(conv.kernel_size), pair(conv.stride), pair(conv.dilation))
        amounts = self.amounts(conv)
        kept = dataclasses.replace(kept, same=self.pads(conv), fixed="" if amounts is None else "_amounts")
        return _dress(new, kept, window, amounts)


def _dress(
    module: nn.Module,
    adapter: Adapter,
    window: tuple[Pair, Pair, Pair],
    amounts: tuple[int, int, int, int] | None = None,
) -> nn.Module:
    """``module`` in the subclass of its class that does what ``adapter`` says, which may be nothing."""
    if adapter.same:
        module._window = window  # type: ignore[assignment]
    if adapter.fixed:
        module._amounts = amounts  # type: ignore[assignment]
    if adapter.same or adapter.fixed or adapter.weight is not None:
        kind: Any = type(module)  # mypy finds classes of modules not hashable
        module.__class__ = _subclass(kind, adapter)
    return module


class _Adapted(nn.Module):
    """Base of the subclasses made here; each belongs to one operator's class and one adapter."""

    _operator: ClassVar[type[nn.Module]]
    _adapter: ClassVar[Adapter]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no name to be imported by: it is made again.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_blank, (self._operator, self._adapter), *reduced[2:])


class _Padding(_Adapted):
    """Pads the first input."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.prepared(input), *args, **kwargs)

    def prepared(self, input: Tensor) -> Tensor:
        """What the operator itself is given."""
        raise NotImplementedError


class _Padded(_Padding):
    """As its size asks for."""

    _window: tuple[Pair, Pair, Pair]

    def prepared(self, input: Tensor) -> Tensor:
        return pad_same(input, *self._window)


class _Surrounded(_Padding):
    """Always by as many zeros."""

    _amounts: tuple[int, int, int, int]

    def prepared(self, input: Tensor) -> Tensor:
        return F.pad(input, self._amounts)


class _Weighted(_Adapted):
    """Reading ``weight`` gives the effective one; the Parameter of that name is the stored one."""

    _extras: tuple[str, ...]

    @property
    def weight(self) -> Tensor:
        assert self._adapter.weight is not None
        # Module's own look-up, not the dictionary: FX replaces it to follow parameters.
        stored = super().__getattr__("weight")
        if self._operator is not nn.Conv2d:
            refuse_folding(type(self).__name__)
        if isinstance(stored, torch.fx.Proxy):
            raise ModelError(f"FX must keep a {type(self).__name__} whole: it would mistake its weights")
        return self._adapter.weight(stored, *(getattr(self, name) for name in self._extras))


def _simplified(self: _Adapted, how: str) -> nn.Module:
    """What the operator's own ``fuse`` or ``fold`` makes of the effective weight; run-time padding stays."""
    bare = self._operator.__new__(self._operator)
    bare.__dict__.update(self.__dict__, _parameters=dict(self._parameters), _buffers=dict(self._buffers))
    if isinstance(self, _Weighted):
        for name in self._extras:
            for held in (bare._parameters, bare._buffers, bare.__dict__):
                held.pop(name, None)
        bare._parameters["weight"] = nn.Parameter(self.weight.detach(), requires_grad=False)
    fused: nn.Module = getattr(bare, how)()
    if isinstance(self, _Surrounded):
        return _dress(fused, Adapter(fixed="_amounts"), ((1, 1), (1, 1), (1, 1)), self._amounts)
    if not isinstance(self, _Padded):
        return fused
    return _dress(fused, Adapter(same=True), self._window)


def _fuse(self: _Adapted) -> nn.Module:
    return _simplified(self, "fuse")


def _fold(self: _Adapted) -> nn.Module:
    return _simplified(self, "fold")


def _reset_parameters(self: _Weighted, *args: Any, **kwargs: Any) -> None:
    """As the operator does it, on the stored weight."""
    kind = type(self)
    self.__class__ = self._operator  # type: ignore[assignment]
    try:
        self.reset_parameters(*args, **kwargs)  # type: ignore[operator]
    finally:
        self.__class__ = kind


@functools.cache
def _subclass(operator: type[nn.Module], adapter: Adapter) -> type[nn.Module]:
    weighted = adapter.weight is not None
    padding = ((_Padded,) if adapter.same else ()) + ((_Surrounded,) if adapter.fixed else ())
    bases = (*padding, *((_Weighted,) if weighted else ()), operator)
    padded = "Same" if adapter.same else "Padded" if adapter.fixed else ""
    name = f"{adapter.prefix if weighted else ''}{padded}{operator.__name__}"
    members: dict[str, Any] = {"_operator": operator, "_adapter": adapter, "__doc__": operator.__doc__}
    # FX tracers keep the modules of torch.nn whole. Let in, they would copy the effective weight for the Parameter.
    members["__module__"] = nn.Module.__module__
    # timm and others act on whether a module has these.
    for method, own in (("fuse", _fuse), ("fold", _fold)):
        if hasattr(operator, method):
            members[method] = own
    if weighted and hasattr(operator, "reset_parameters"):
        members["reset_parameters"] = _reset_parameters
    return type(name, bases, members)


def _blank(operator: Any, adapter: Adapter) -> nn.Module:
    kind = _subclass(operator, adapter)
    return kind.__new__(kind)


_adapters: dict[type[nn.Module] | str, Adapter] = {}


def _path(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def register_adapter(kind: type[nn.Conv2d] | str, adapter: Adapter) -> None:
    """Let operators take the place of modules that are exactly of class ``kind``.

    Args:
        kind: a subclass of ``torch.nn.Conv2d``, or its name behind that of the module that defines it, which is not
            imported for it.
        adapter: what the subclass does besides convolving.

    Raises:
        ConvSurgeryError: for a class that is no such subclass, or that has an adapter.

    Example:
        >>> class Positive(nn.Conv2d):
        ...     def forward(self, input):
        ...         return F.conv2d(input, self.weight.abs(), self.bias, self.stride)
        >>> register_adapter(Positive, Adapter(weight=torch.abs, prefix="Positive"))
    """
    if isinstance(kind, str):
        name, taken = kind, {_path(known) for known in _adapters if not isinstance(known, str)}
    else:
        name, taken = _path(kind), {known for known in _adapters if isinstance(known, str)}
        if not issubclass(kind, nn.Conv2d) or kind is nn.Conv2d:
            raise ConvSurgeryError(f"an adapter is for a subclass of torch.nn.Conv2d, not for {name}")
    if kind in _adapters or name in taken:
        raise ConvSurgeryError(f"{name} already has an adapter")
    _adapters[kind] = adapter


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of the exact class of ``module``, or None.

    A Conv2d that took the place of an adapted one (the null operator's) has one too, so that it can be converted again.
    """
    kind = type(module)
    if isinstance(module, _Adapted):
        return module._adapter if module._operator is nn.Conv2d else None
    found = _adapters.get(kind)
    found = _adapters.get(_path(kind)) if found is None else found
    if found is None and isinstance(module, nn.Conv2d) and kind is not nn.Conv2d and _convolves(kind):
        return _PLAIN
    return found


_PLAIN = Adapter()
#: what a class may define and still convolve as Conv2d does
_HARMLESS = frozenset(
    {
        *("__init__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__constants__"),
        *("__annotations__", "__annotate_func__", "__annotations_cache__", "__parameters__", "__orig_bases__"),
        *("__firstlineno__", "__static_attributes__", "extra_repr", "reset_parameters"),
    }
)


def _convolves(kind: type[nn.Module]) -> bool:
    """Whether a subclass of Conv2d only chooses its options: nothing that a call runs is its own."""
    return all(_HARMLESS.issuperset(vars(base)) for base in kind.__mro__ if base not in nn.Conv2d.__mro__)


def standardised(stored: Tensor, eps: float) -> Tensor:
    """Every filter with mean 0 and variance 1 (Qiao et al., 2019, arXiv 1903.10520, eq. 9 and 10)."""
    return _normalised(stored, None, eps)


def scaled_standardised(stored: Tensor, gain: Tensor, scale: float, eps: float) -> Tensor:
    """The same times ``gain · scale``, ``gain`` (C_out, 1, 1, 1) (Brock et al., 2021, arXiv 2101.08692, eq. 2)."""
    return _normalised(stored, (gain * scale).view(-1), eps)


def _normalised(stored: Tensor, factor: Tensor | None, eps: float) -> Tensor:
    # As a batch norm of one image with the filters as channels: the very calls of timm, so that results are bit-equal.
    rows = stored.reshape(1, stored.shape[0], -1)
    normed = F.batch_norm(rows, None, None, weight=factor, training=True, momentum=0.0, eps=eps)
    return normed.reshape_as(stored)


_STD = Adapter(weight=standardised, extras=("eps",), prefix="Std")
_SCALED = Adapter(weight=scaled_standardised, extras=("gain", "scale", "eps"), prefix="ScaledStd")

for _name, _adapter in {
    "conv2d_same.Conv2dSame": Adapter(same=True),
    "conv2d_same.Conv2dSameExport": Adapter(same=True),
    "std_conv.StdConv2d": _STD,
    "std_conv.StdConv2dSame": dataclasses.replace(_STD, same="same_pad"),
    "std_conv.ScaledStdConv2d": _SCALED,
    "std_conv.ScaledStdConv2dSame": dataclasses.replace(_SCALED, same="same_pad"),
}.items():
    register_adapter(f"timm.layers.{_name}", _adapter)

for _name, _adapter in {
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d": dataclasses.replace(_STD, same="pad"),
    "transformers.models.perceiver.modeling_perceiver.Conv2dSamePadding": Adapter(fixed="zero_pad_2d"),
    "segmentation_models_pytorch.encoders._efficientnet.Conv2dStaticSamePadding": Adapter(fixed="static_padding"),
    "segmentation_models_pytorch.encoders._efficientnet.Conv2dDynamicSamePadding": Adapter(same=True),
}.items():
    register_adapter(_name, _adapter)
