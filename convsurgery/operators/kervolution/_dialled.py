"""The layer of the dialled kernels: the convolution where ε is 0, the paper's kernel on its filters where ε is 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from convsurgery.operators.base import Built, Fitter, OperatorConfig, Start
from convsurgery.operators.kervolution._fitting import DialFit
from convsurgery.operators.kervolution._layer import Kervolution2d

__all__ = ["DialConfig", "Dialled"]


class Dialled(Kervolution2d):
    r"""Base of the layers that begin by neutral: :math:`y_o = g_o\,F_ε(w_o^\top x) + b_o` over every window.

    F is the kernel on the convolution's own filters, less its response to an empty window, in a form that is wᵀx for
    ε = 0: there the layer makes the very call that :class:`torch.nn.Conv2d` makes, and its output is that bit for bit,
    in every dtype and at every size of the inputs. ``eps`` is a buffer, () or (C_out,); ``gain`` g and ``offset``
    (added to the bias) are absent until a fit sets them. The filters are never scaled.

    A learnable hyperparameter is stored as the logarithm of its ratio to what it began with; its training moves the
    kernel's response as the kernel does, the constants around it staying.

    Args:
        eps: ε, from 0 to 1; beyond that nothing is promised.
        args, kwargs: of the kernel, and the options of :class:`torch.nn.Conv2d`.
    """

    constants = ("eps", "gain", "offset", "scale")
    #: name of the learnable parameter
    log_name: ClassVar[str] = ""
    least_eps: ClassVar[float] = 0.0
    scales: ClassVar[bool] = False

    def __init__(self, *args: Any, eps: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = self.constant(eps)

    # -- hyperparameter

    def set_hyper(self, value: Tensor, learnable: bool | str) -> None:
        """Store what the hyperparameter begins with, and where it is learnable the logarithm of what becomes of it."""
        self._parameters.pop(self.log_name, None)
        self._buffers[self.hyper_name] = value
        if learnable:
            shape = (self.out_channels,) if learnable == "channel" else ()
            log = nn.Parameter(value.new_zeros(shape), requires_grad=self.weight.requires_grad)
            self.register_parameter(self.log_name, log)

    def hyper(self) -> Tensor:
        """The hyperparameter's present value as the op has it, () or (C_out,)."""
        return self.dial_constants()[1][0]

    def change(self, power: int = 1) -> Tensor | None:
        """What a learnable hyperparameter was multiplied by since the start, to a power; None where none is learned."""
        log = self._parameters.get(self.log_name) if self.log_name else None
        return None if log is None else self.bounded_exp(log * power)

    def dial_constants(self) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """ε, the hyperparameter where the kernel has one, and the gain, as the op wants them now."""
        assert self.eps is not None
        return self.eps, (), self.gain

    def times(self, factor: Tensor) -> Tensor:
        """The gain with another one on top."""
        return factor if self.gain is None else self.gain * factor

    # -- forward

    def kernel(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        op = getattr(torch.ops.convsurgery, f"{self.op_name}_dial")
        eps, hyper, gain = self.dial_constants()
        window = (self.stride, padding, self.dilation, self.groups)
        out: Tensor = op(x, self.weight, self.full_bias(), gain, eps, *hyper, *self.options().values(), *window)
        return out

    # -- starts

    @classmethod
    def like(cls, conv: nn.Conv2d | Kervolution2d, *, centered: bool = False, **options: Any) -> Self:
        layer = super().like(conv, centered=centered, **options)
        layer.eps = layer.constant(0.0)  # on the right device
        return layer

    def set_nonlinearity(self, eps: float) -> None:
        assert self.eps is not None
        with torch.no_grad():
            # In place: training keeps snapshots of these very tensors.
            self.eps.fill_(eps)

    def begin(self, start: Start, eps: float | None = None, *, absorb: bool = False) -> Built:
        """Finish the neutral start. There is nothing for a BatchNorm to absorb."""
        # Given no ε, data may choose one.
        self.free_eps = start.value is None
        self.eps = self.constant(start.value or 0.0)
        return Built(self)

    def fitter(self, conv: nn.Conv2d, ridge: float | None = None, *, shift: bool = False) -> Fitter:
        """Fits ε, gain and offset. They stay here: the BatchNorm behind keeps its statistics."""
        return DialFit(self)

    # -- deployment

    def fold(self) -> Self:
        fused = type(self).like(self, **self.options())
        fused.folded = True
        eps, hyper, gain = self.dial_constants()
        bias = self.full_bias()
        fused.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        fused.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        fused.eps = eps.detach().clone()
        fused.gain = None if gain is None else gain.detach().expand(self.out_channels).clone()
        if self.hyper_name:
            fused.set_hyper(hyper[0].detach().clone(), learnable=False)
        return fused

    def complete(self) -> None:
        if self.gain is None:
            self.gain = self.constant(torch.ones(self.out_channels))
        if self.bias is None:
            self.bias = nn.Parameter(self.weight.new_zeros(self.out_channels), requires_grad=False)

    # -- state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}scale" in state_dict:
            args[-1].append(
                f"{prefix.rstrip('.') or 'the layer'} was saved by convsurgery 0.1, whose neutral start scaled the "
                "filters; here ε stands beside them. Load its folder by convsurgery.load"
            )
            return
        if f"{prefix}eps" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        else:
            # The weights of a convolution: the constants of this layer have nothing to do with them.
            nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        assert self.eps is not None
        shown = "meta" if self.eps.is_meta else f"{self.eps.item():.4g}" if self.eps.dim() == 0 else "per channel"
        return f"{super().extra_repr()}, eps={shown}"


@dataclass(frozen=True)
class DialConfig(OperatorConfig):
    """Base of the configs whose neutral start builds a :class:`Dialled` layer."""

    starts: ClassVar[Mapping[str, str]] = {"neutral": "exact", "copy": "none", "random": "none"}
    leaves_gain: ClassVar[bool] = False

    def keeps(self, start: Start) -> str:
        if start.name == "neutral" and (start.value or start.scaled):
            return "approximate"
        return super().keeps(start)
