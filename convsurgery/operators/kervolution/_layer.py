"""The layer all kernels share: geometry, constants, starts, fusing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from convsurgery.errors import ConvSurgeryError
from convsurgery.geometry import Cost, Site
from convsurgery.operators.base import Built, Fitter, Start
from convsurgery.operators.kervolution._fitting import AffineFit, NeutralFit
from convsurgery.operators.layer import OperatorLayer, conv_options
from convsurgery.operators.precision import REDUCED, widened

__all__ = ["SHARE", "Kervolution2d", "distance_cost", "learnable_cost", "power_of_two", "quantile"]

#: share of saturated outputs from which on a layer is told of
SHARE = 0.2

#: A BatchNorm takes over per-channel gains only while they lie within this factor of each other; beyond it, dead
#: filters would meet a much smaller epsilon in training than they had.
_ABSORB_SPREAD = 256.0


_LOG_BOUND = 87.0


class Kervolution2d(OperatorLayer):
    r"""Base of the kervolution layers: :math:`y_o = g_o\,[κ(x, a_o w_o) − κ_0] + b_o` over every window.

    The options are those of :class:`torch.nn.Conv2d` (Wang et al., 2019, §3.4); the bias stands outside the kernel.
    ``gain`` g, ``scale`` a and ``offset`` (added to the bias) are constants of the layer, not parameters: absent (1, 1,
    0) in the paper's own form, set by the neutral start, which also notes its ``eps``. With ``centered`` the response
    κ₀ = κ(0, w) to an empty window is subtracted, in a form that does not cancel.

    Shapes:
        input (N, C_in, H, W) or (C_in, H, W); output as :class:`torch.nn.Conv2d` gives it.
    """

    #: name of the kernel's op in ``torch.ops.convsurgery``
    op_name: ClassVar[str]
    #: name of the hyperparameter tensor, or "" for a kernel without one
    hyper_name: ClassVar[str] = ""
    constants: ClassVar[tuple[str, ...]] = ("scale", "gain", "offset", "eps")
    #: how the constants (and "hyper") go with ε when only the nonlinearity is to change: the powers of the ratio
    dial: ClassVar[dict[str, int]] = {}

    #: the smallest ε that its dial can be set to: below it the constants leave the range of float32
    least_eps: ClassVar[float] = 1e-12

    #: whether the neutral start scales the filters, as convsurgery 0.1 had it
    scales: ClassVar[bool] = True

    #: whether :meth:`fold` has made it
    folded = False

    bias: Tensor | None
    scale: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    eps: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        centered: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = self.take_options(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        self.centered = centered
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        # torch.export counts absent buffers too, so that those that are always there come first.
        for name in (self.hyper_name, *self.constants):
            if name:
                self.register_buffer(name, None)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weights and bias as :class:`torch.nn.Conv2d` does."""
        bound = 1 / math.sqrt(max(1, self.geometry.patch))
        for parameter in (self.weight, self.bias):
            if parameter is not None and not parameter.is_meta:
                with torch.no_grad():
                    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.copy_(drawn)

    # -- hyperparameter: positive, one value or one for each output channel

    def set_hyper(self, value: Tensor, learnable: bool | str) -> None:
        """Store the hyperparameter: as it is when fixed, as its logarithm when learnable, so that it stays positive."""
        name = self.hyper_name
        self._parameters.pop(f"log_{name}", None)
        if not learnable:
            self._buffers[name] = value
            return
        self._buffers.pop(name, None)
        value = value.expand(self.out_channels).clone() if learnable == "channel" else value
        self.register_parameter(f"log_{name}", nn.Parameter(value.log(), requires_grad=self.weight.requires_grad))

    def hyper(self) -> Tensor:
        """The hyperparameter's present value, () or (C_out,)."""
        log = self._parameters.get(f"log_{self.hyper_name}")
        value = self._buffers[self.hyper_name] if log is None else self.bounded_exp(log)
        assert value is not None
        return value

    @staticmethod
    def bounded_exp(log: Tensor) -> Tensor:
        """exp, neither 0 nor infinite in float32."""
        return log.clamp(-_LOG_BOUND, _LOG_BOUND).exp()

    def change_hyper(self, value: Tensor) -> None:
        """Another value, fixed or learnable as the present one is."""
        log = self._parameters.get(f"log_{self.hyper_name}")
        if log is None:
            self._buffers[self.hyper_name] = value
        else:
            log.data = value.log().expand_as(log).to(log).clone()

    def options(self) -> dict[str, Any]:
        """The arguments of constructor and op that only this kernel has, but for the hyperparameter."""
        return {}

    # -- forward

    def kernel(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """The torch op of this kernel on a padded input; the arguments are in the order of its schema."""
        op = getattr(torch.ops.convsurgery, self.op_name)
        hyper = (self.hyper(),) if self.hyper_name else ()
        constants = (*hyper, self.gain, self.scale)
        window = (self.stride, padding, self.dilation, self.groups)
        out: Tensor = op(x, self.weight, self.full_bias(), *constants, *self.options().values(), self.centered, *window)
        return out

    def full_bias(self) -> Tensor | None:
        if self.offset is None or self.bias is None:
            return self.bias if self.offset is None else self.offset
        return self.bias + self.offset

    def forward(self, input: Tensor) -> Tensor:
        left, right, top, bottom = self.geometry.padding
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return self.kernel(input, (top, left))
        if self.padding_mode == "zeros":
            # As torch does it for "same": only the odd pixel is added to the image.
            return self.kernel(F.pad(input, [0, right - left, 0, bottom - top]), (top, left))
        return self.kernel(F.pad(input, [left, right, top, bottom], self.padding_mode), (0, 0))

    # -- starts

    @classmethod
    def like(cls, conv: nn.Conv2d | Kervolution2d, *, centered: bool, **options: Any) -> Self:
        """A layer with the geometry, mode and very Parameter objects of ``conv``."""
        layer = cls(**conv_options(conv), centered=centered, device="meta", **options)
        layer.weight, layer.bias = conv.weight, conv.bias
        if cls.hyper_name:
            layer._buffers[cls.hyper_name] = None  # the caller sets it, on the right device
        return layer.train(conv.training)

    def constant(self, value: Tensor | float) -> Tensor:
        """A constant on the weight's device, in at least float32."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.as_tensor(value, dtype=torch.float64).to(dtype).to(self.weight.device)

    def neutral(self, eps: float) -> Tensor:
        """Set scale and hyperparameter for a neutral setting of this ε; returns the gain that undoes them, float64."""
        raise NotImplementedError

    def dial_position(self) -> float:
        """ε of the neutral start; the mean where channels have their own."""
        return float(self._began_neutral().detach().mean())

    def _began_neutral(self) -> Tensor:
        if self.eps is None:
            raise ConvSurgeryError(f"{type(self).__name__} did not start by neutral: it has no ε to change")
        return self.eps

    def set_nonlinearity(self, eps: float) -> None:
        """Go to another ε from the neutral start's; what the layer does to small inputs stays as it is."""
        ratio = eps / float(self._began_neutral())
        for name, power in self.dial.items():
            if name == "hyper" and (log := self._parameters.get(f"log_{self.hyper_name}")) is not None:
                log.data += power * math.log(ratio)
                continue
            stored = self.hyper_name if name == "hyper" else name
            value = self._buffers[stored]
            assert value is not None
            # In place: training keeps snapshots of these very tensors.
            value.copy_(value.double() * ratio**power)
        self._began_neutral().fill_(eps)

    def begin(self, start: Start, eps: float | None, *, absorb: bool) -> Built:
        """Finish a start; ``eps`` is that of the neutral one where the kernel has it.

        With ``absorb``, and without a bias, the power of two nearest to the gains stays here, so that the output keeps
        the convolution's magnitude also in half precision, and the per-channel rest is left to the BatchNorm.
        """
        if start.name == "random":
            self.redraw(int(start.value or 0))
        if start.name != "neutral" or eps is None:
            return Built(self)
        # Given no ε, data may choose one.
        self.free_eps = start.value is None
        eps = power_of_two(start.value or eps)
        self.eps, gain = self.constant(eps), self.neutral(eps)
        residual = self.take_gain(gain) if absorb and self.bias is None else None
        if residual is None:
            self.gain = self.constant(gain)
        return Built(self, None if residual is None or bool((residual == 1).all()) else residual)

    def take_gain(self, gain: Tensor) -> Tensor | None:
        """Keep the power of two nearest to the gains (float64); what it leaves of each channel, (C_out,).

        None, and nothing is kept, where the gains are too different for a BatchNorm, or not positive.
        """
        if not float(gain.min()) > 0 or float(gain.max() / gain.min()) > _ABSORB_SPREAD:
            return None
        kept = power_of_two(float(gain.log2().mean().exp2()))
        self.gain = self.constant(kept)
        return (kept / gain).expand(self.out_channels).clone()

    def redraw(self, seed: int) -> None:
        """New random parameters in place of the convolution's, which are left as they are."""
        for name in ("weight", "bias"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad))
        self.reset_parameters(torch.Generator().manual_seed(seed))

    # -- deployment

    def fold(self) -> Self:
        """This layer with its constants folded: scale into the filters, offset into the bias, nothing learnable.

        Computes the same up to rounding. Half-precision layers
        keep their scale, which their filters could not hold.
        """
        fused = type(self).like(self, centered=self.centered, **self.options())
        fused.folded = True
        weight, bias = self.weight.detach(), self.full_bias()
        fold = self.scale is not None and weight.dtype in (torch.float32, torch.float64)
        if fold and self.scale is not None:
            weight = weight * (self.scale if self.scale.dim() == 0 else self.scale.view(-1, 1, 1, 1))
        else:
            fused.scale = self.scale
        fused.weight = nn.Parameter(weight.clone(), requires_grad=False)
        fused.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        if self.gain is not None:
            fused.gain = self.gain.expand(self.out_channels).clone()
        if self.hyper_name:
            fused.set_hyper(self.hyper().detach().clone(), learnable=False)
        return fused

    def absorb_affine(self, gain: Tensor, bias: Tensor) -> bool:
        """Follow this layer by ``gain · y + bias`` (both (C_out,)), folded into its own constants; always possible."""
        old_bias = self.full_bias()
        old_gain = gain.new_ones(()) if self.gain is None else self.gain.to(gain.dtype)
        total = bias if old_bias is None else bias + gain * old_bias.detach()
        self.gain = self.constant(old_gain * gain)
        self.offset = None
        self.bias = nn.Parameter(total.to(self.weight), requires_grad=False)
        return True

    def leave_gain(self) -> Tensor | None:
        if self.gain is None or not float(self.gain.min()) > 0:
            return None
        gain = self.gain.double().expand(self.out_channels).clone()
        bias = self.full_bias()
        self.gain = self.offset = None
        if bias is not None:
            self.bias = nn.Parameter((bias.detach().double() / gain).to(self.weight), requires_grad=False)
        return gain

    def fitter(self, conv: nn.Conv2d, ridge: float | None = None, *, shift: bool = False) -> Fitter:
        """Fits gain and offset, and for a neutral start ε; a penalty has no part in it."""
        return AffineFit(self) if self.eps is None else NeutralFit(self, absorb=shift)

    def padded(self, input: Tensor) -> Tensor:
        """The input with zeros around, whatever the padding mode, in at least float32: to look at responses."""
        left, right, top, bottom = self.geometry.padding
        return widened(F.pad(input, [left, right, top, bottom]))

    def saturation(self, input: Tensor) -> str | None:
        """What to change where this kernel hardly answers to its input any more; None where it does."""
        return None

    def takes_filters(self) -> bool:
        return True

    # -- state: constants may be absent, scalars or vectors, and the file decides

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        given = f"{prefix}eps" in state_dict and f"{prefix}scale" not in state_dict
        if self.scales and self.eps is not None and given:
            args[-1].append(
                f"{prefix.rstrip('.') or 'the layer'} began by neutral as convsurgery 0.1 had it, which scaled the "
                "filters; these weights are of a layer of today. Load their folder by convsurgery.load"
            )
            return
        names = [*self.constants, *([self.hyper_name] if self.hyper_name in self._buffers else [])]
        for name in names:
            stored, own = state_dict.get(prefix + name), self._buffers[name]
            if stored is None:
                if name in self.constants:
                    self._buffers[name] = None
            elif own is None or own.shape != stored.shape:
                self._buffers[name] = torch.empty_like(stored, device=self.weight.device)
        bias = state_dict.get(prefix + "bias")
        if self.folded and self.bias is None and bias is not None:
            # An offset that data had found was folded into it.
            self.bias = nn.Parameter(torch.empty_like(bias, device=self.weight.device), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # ``half()`` must not reach the constants: a neutral gain or γ lies outside float16.
        before = dict(self._buffers)
        name_of_log = next((name for name in self._parameters if name.startswith("log_")), "")
        log = self._parameters.get(name_of_log)
        log_before = None if log is None else log.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in REDUCED:
                self._buffers[name] = old.to(new.device)
        log = self._parameters.get(name_of_log)
        if log is not None and log_before is not None and log.dtype in REDUCED:
            log.data = log_before.to(log.device)
        return self

    def extra_repr(self) -> str:
        g = self.geometry
        text = f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}"
        if self.padding not in ((0, 0), "valid"):
            text += f", padding={self.padding}"
        if g.dilation != (1, 1):
            text += f", dilation={g.dilation}"
        if g.groups != 1:
            text += f", groups={g.groups}"
        if self.bias is None:
            text += ", bias=False"
        if g.padding_mode != "zeros":
            text += f", padding_mode={g.padding_mode}"
        if self.hyper_name:
            learnable = any(name.startswith("log_") for name in self._parameters)
            value = self.hyper()
            shown = "meta" if value.is_meta else f"{value.item():.4g}" if value.dim() == 0 else "per channel"
            text += f", {self.hyper_name}={shown}" + (", learnable" if learnable else "")
        return text + (", centered" if self.centered else "")


def learnable_cost(site: Site, learnable: bool | str, base: Cost) -> Cost:
    """``base`` with the parameters of a learnable hyperparameter: one, or one per output channel."""
    extra = site.geometry.out_channels if learnable == "channel" else int(bool(learnable))
    return Cost(base.params + extra, base.macs)


def distance_cost(site: Site) -> Cost:
    """A convolution's cost and that of ‖x‖² under the window: a sum over channels, then over the window."""
    g, base = site.geometry, site.cost
    # All calls together; what is padded is left out.
    pixels = site.positions * g.stride[0] * g.stride[1]
    window = g.groups * g.kernel_size[0] * g.kernel_size[1] * site.positions
    return Cost(base.params, base.macs + g.in_channels * pixels + window)


def quantile(values: Tensor, share: float) -> float:
    """The value below which ``share`` of all lie, from at most some ten thousand of them."""
    flat = values.detach().float().flatten()
    return float(torch.quantile(flat[:: max(1, flat.numel() // 50_000)], share))


def power_of_two(value: float) -> float:
    """The power of two nearest to a positive number, by ratio."""
    if not (value > 0 and math.isfinite(value)):
        raise ConvSurgeryError(f"no power of two is near {value}")
    return 2.0 ** round(math.log2(value))
