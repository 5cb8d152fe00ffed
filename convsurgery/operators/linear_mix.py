"""LinearMix: a depthwise convolution plus a 1x1 convolution, in place of a full one; eq. 7 of the low-cost paper."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from convsurgery.geometry import Cost, Pair, Site, pair
from convsurgery.operators.base import Built, Fitter, OperatorConfig, Start, option, register_operator
from convsurgery.operators.chunks import by_image, worth_chunking
from convsurgery.operators.layer import OperatorLayer, conv_options
from convsurgery.operators.library import define_op
from convsurgery.operators.onnx import CONV_ATTRIBUTES, NodeForm, OnnxFunction
from convsurgery.operators.precision import no_grad_needed, result_dtype
from convsurgery.operators.ridge import RIDGE
from convsurgery.operators.sparsefit import SparseFit

__all__ = ["LinearMix", "LinearMix2d", "linear_mix"]


def _middle(kernel: Pair) -> Pair:
    """The tap that the 1x1 convolution shares: the middle, or the one before it."""
    return (kernel[0] - 1) // 2, (kernel[1] - 1) // 2


def _cuts(kernel: Pair, padding: Pair, dilation: Pair) -> tuple[int, int, int, int]:
    """Pixels to take off the image (top, left, bottom, right) so that a 1x1 window lies under the middle tap."""
    begin = [m * d - p for m, d, p in zip(_middle(kernel), dilation, padding, strict=True)]
    end = [d * (k - 1 - m) - p for m, k, d, p in zip(_middle(kernel), kernel, dilation, padding, strict=True)]
    return begin[0], begin[1], end[0], end[1]


def _spread(inputs: int, outputs: int) -> str:
    return "same" if inputs == outputs else "fewer" if outputs < inputs else "more"


def _first(x: Tensor, groups: int, count: int) -> Tensor:
    """The first ``count`` channels of every group."""
    channels: Tensor = x.unflatten(1, (groups, -1))[:, :, :count].flatten(1, 2)
    return channels


def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mix: Tensor,
    outputs: str,
    shared: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    dtype = result_dtype(x)
    x, weight, mix = x.to(dtype), weight.to(dtype), mix.to(dtype)
    kernel = (kernel_size[0], kernel_size[1])
    top, left, bottom, right = _cuts(kernel, (padding[0], padding[1]), (dilation[0], dilation[1]))
    bias = None if bias is None else bias.to(dtype)

    def compute(x: Tensor) -> Tensor:
        seen = F.pad(x, [-left, -right, -top, -bottom]) if any((top, left, bottom, right)) else x
        y = F.conv2d(seen, mix, bias, stride, groups=groups)
        own = _first(x, groups, shared // groups) if outputs == "fewer" else x
        spatial = F.conv2d(own, weight, None, stride, padding, dilation, shared)
        if outputs == "more":
            grouped = spatial.unflatten(1, (groups, -1))
            spatial = F.pad(grouped, [0, 0, 0, 0, 0, (y.shape[1] - shared) // groups]).flatten(1, 2)
        return y.add_(spatial) if no_grad_needed(x, weight, bias, mix) else y + spatial

    if x.shape[0] > 1 and worth_chunking(x, weight, bias, mix):
        return by_image(compute, x)
    return compute(x)


define_op(
    "linear_mix2d(Tensor input, Tensor weight, Tensor? bias, Tensor mix, str outputs, int shared, "
    "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
    _op,
)


def linear_mix(
    input: Tensor,
    weight: Tensor,
    mix: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """A depthwise and a 1x1 convolution of the same image, added: ``weight ∗ input + mix · input + bias``.

    *Low-Cost Parameterizations of Deep Convolutional Neural Networks*, eq. 7. The mix sees the pixel under the middle
    tap of the window (the one before the middle, for an even kernel). It is the convolution whose filters are zero but
    for the own channel and the middle tap; the diagonal of the mix doubles that tap of the own channel.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W).
        weight: (min(C_in, C_out), 1, kh, kw). Where channels are unequal, the first ones of each group are convolved.
        mix: (C_out, C_in / groups, 1, 1).
        bias: (C_out,).
        stride, padding, dilation: as for :func:`torch.nn.functional.conv2d`, in pixels; padding with zeros.
        groups: of the mix.

    Returns:
        (N, C_out, H_out, W_out), as the convolution gives it.

    Raises:
        ValueError: for weights whose shapes do not fit each other.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> x, k, m = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(8, 8, 1, 1)
        >>> CF.linear_mix(x, k, m, padding=1).shape
        torch.Size([1, 8, 9, 9])
    """
    inputs, outputs = mix.shape[1] * groups, mix.shape[0]
    if weight.shape[0] != min(inputs, outputs) or weight.shape[1] != 1:
        raise ValueError(
            f"weight must be ({min(inputs, outputs)}, 1, kh, kw) for a mix of {inputs} to {outputs} channels, not "
            f"{tuple(weight.shape)}"
        )
    window = (pair(stride), pair(padding), pair(dilation), groups)
    spread, kernel = _spread(inputs, outputs), (weight.shape[2], weight.shape[3])
    out: Tensor = torch.ops.convsurgery.linear_mix2d(input, weight, bias, mix, spread, weight.shape[0], kernel, *window)
    return out


class LinearMix2d(OperatorLayer):
    """Layer form of :func:`linear_mix`; options as :class:`torch.nn.Conv2d`.

    ``fuse()`` gives the equivalent dense ``torch.nn.Conv2d``.

    Example:
        >>> import torch
        >>> layer = LinearMix2d(8, 8, 3, padding=1)
        >>> sum(p.numel() for p in layer.parameters())  # 9 · 8 + 8 · 8 + 8
        144
    """

    mix: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: str | int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        shape = self.take_options(in_channels, out_channels, *options)
        shared = min(in_channels, out_channels)
        self.weight = nn.Parameter(torch.empty(shared, 1, *shape[2:], device=device, dtype=dtype))
        self.mix = nn.Parameter(torch.empty(out_channels, shape[1], 1, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all values as :class:`torch.nn.Conv2d` draws those of a filter with as many free taps."""
        taps = self.mix.shape[1] + math.prod(self.kernel_size) - 1
        bound = 1 / math.sqrt(max(1, taps))
        for parameter in (self.weight, self.mix, self.bias):
            if parameter is not None and not parameter.is_meta:
                with torch.no_grad():
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, input: Tensor) -> Tensor:
        x, padding = self.padded(input)
        form = (_spread(self.in_channels, self.out_channels), min(self.in_channels, self.out_channels))
        window = (self.kernel_size, self.stride, padding, self.dilation, self.groups)
        out: Tensor = torch.ops.convsurgery.linear_mix2d(x, self.weight, self.bias, self.mix, *form, *window)
        return out

    def padded(self, input: Tensor) -> tuple[Tensor, Pair]:
        """The input padded where the op cannot, and the padding left to the op."""
        left, right, top, bottom = self.geometry.padding
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return input, (top, left)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, [left, right, top, bottom], mode), (0, 0)

    def shared(self) -> tuple[Tensor, Tensor]:
        """The output channels that see a window of their own, and the input channels it is taken from, (S,) each."""
        count = self.weight.shape[0] // self.groups
        within = torch.arange(count, device=self.weight.device)
        steps = torch.arange(self.groups, device=self.weight.device).unsqueeze(1)
        outputs, inputs = (within + steps * (c // self.groups) for c in (self.out_channels, self.in_channels))
        return outputs.flatten(), inputs.flatten()

    def dense(self) -> Tensor:
        """The filters of the equivalent convolution, (C_out, C_in / groups, kh, kw)."""
        row, column = _middle(self.kernel_size)
        filters = self.mix.new_zeros(self.out_channels, self.mix.shape[1], *self.kernel_size)
        filters[:, :, row, column] = self.mix[:, :, 0, 0]
        outputs, inputs = self.shared()
        filters[outputs, inputs % self.mix.shape[1]] = filters[outputs, inputs % self.mix.shape[1]] + self.weight[:, 0]
        return filters

    def project(self, weight: Tensor) -> None:
        """The nearest of all LinearMix filters to ``weight`` (C_out, C_in / groups, kh, kw), by the sum of squares.

        The free values are kept and the others dropped. The diagonal of the mix, which doubles the middle tap of the
        own channel, becomes 0.
        """
        row, column = _middle(self.kernel_size)
        outputs, inputs = self.shared()
        own = inputs % self.mix.shape[1]  # the place of a channel among those of its group
        with torch.no_grad():
            self.weight.copy_(weight[outputs, own].unsqueeze(1))
            self.mix.copy_(weight[:, :, row, column, None, None])
            self.mix[outputs, own] = 0

    def fitter(self, conv: nn.Conv2d, ridge: float | None = None, *, shift: bool = False) -> Fitter:
        return SparseFit(self, conv.weight.detach(), RIDGE if ridge is None else ridge, shift=shift)

    def fold(self) -> Self:
        folded = copy.copy(self)
        folded._parameters = {
            name: None if parameter is None else nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, parameter in self._parameters.items()
        }
        return folded

    def absorb_affine(self, gain: Tensor, bias: Tensor) -> bool:
        gain, total = gain.double(), bias.double()
        if self.bias is not None:
            total = total + gain * self.bias.detach().double()
        outputs, _ = self.shared()
        for name, factor in (("weight", gain[outputs]), ("mix", gain)):
            old = getattr(self, name).detach()
            scaled = (old.double() * factor.view(-1, 1, 1, 1)).to(old)
            setattr(self, name, nn.Parameter(scaled, requires_grad=False))
        self.bias = nn.Parameter(total.to(self.weight), requires_grad=False)
        return True

    def fuse(self) -> nn.Conv2d:
        """The equivalent dense convolution, with the same options and the same outputs up to rounding."""
        conv = nn.Conv2d(**conv_options(self), device="meta")
        conv.weight = nn.Parameter(self.dense().detach(), requires_grad=False)
        conv.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.geometry}, padding={self.padding}" + ("" if self.bias is not None else ", bias=False")


def _overload(form: NodeForm) -> str:
    cuts = _form_cuts(form)
    # A group is an attribute of Conv, and only the convolution's own can be handed on.
    words = [form.words["outputs"], f"{form.attributes['shared']}"]
    words += [f"g{form.attributes['group']}"] if form.words["outputs"] != "same" else []
    words += ["cut" + "_".join(str(cut).replace("-", "m") for cut in cuts)] if any(cuts) else []
    return "_".join([*words, *(["bias"] if "bias" in form else [])])


def _form_cuts(form: NodeForm) -> tuple[int, int, int, int]:
    kernel, pads, dilations = (form.lists[name] for name in ("kernel_shape", "pads", "dilations"))
    return _cuts((kernel[0], kernel[1]), (pads[0], pads[1]), (dilations[0], dilations[1]))


def _body(form: NodeForm) -> list[str]:
    top, left, bottom, right = _form_cuts(form)
    lines, seen, own = [], "X", "X"
    if any((top, left, bottom, right)):
        pads = [0, 0, -top, -left, 0, 0, -bottom, -right]
        lines += [f"cuts = Constant <value_ints = {pads}> ()", 'seen = Pad <mode = "constant"> (X, cuts)']
        seen = "seen"
    bias = ", bias" if "bias" in form else ""
    lines.append(
        "mixed = Conv <dilations = [1, 1], group: int = @group, kernel_shape = [1, 1], pads = [0, 0, 0, 0], "
        f"strides: ints = @strides> ({seen}, mix{bias})"
    )
    group, shared = form.attributes["group"], form.attributes["shared"]
    split = f"[0, {group}, -1]"
    if form.words["outputs"] == "fewer":
        lines += [
            f"split = Constant <value_ints = {split}> ()",
            "x_space = Shape <start = 2> (X)",
            "x_split = Concat <axis = 0> (split, x_space)",
            "x_groups = Reshape (X, x_split)",
            "first = Constant <value_ints = [0]> ()",
            f"last = Constant <value_ints = [{shared // group}]> ()",
            "within = Constant <value_ints = [2]> ()",
            "own_groups = Slice (x_groups, first, last, within)",
            f"together = Constant <value_ints = [0, {shared}]> ()",
            "own_shape = Concat <axis = 0> (together, x_space)",
            "own = Reshape (own_groups, own_shape)",
        ]
        own = "own"
    lines.append(
        f"spatial = Conv <dilations: ints = @dilations, group = {form.attributes['shared']}, "
        f"pads: ints = @pads, strides: ints = @strides> ({own}, W)"
    )
    if form.words["outputs"] == "more":
        lines += [
            f"split = Constant <value_ints = {split}> ()",
            "y_space = Shape <start = 2> (spatial)",
            "y_split = Concat <axis = 0> (split, y_space)",
            "y_groups = Reshape (spatial, y_split)",
            "all_count = Shape <start = 0, end = 1> (mix)",
            f"shared_count = Constant <value_ints = [{shared}]> ()",
            "missing = Sub (all_count, shared_count)",
            f"group_count = Constant <value_ints = [{group}]> ()",
            "missing_each = Div (missing, group_count)",
            "zeros = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0]> ()",
            "tail = Constant <value_ints = [0, 0]> ()",
            "widening = Concat <axis = 0> (zeros, missing_each, tail)",
            'wide_groups = Pad <mode = "constant"> (y_groups, widening)',
            "mixed_shape = Shape (mixed)",
            "spread = Reshape (wide_groups, mixed_shape)",
            "Y = Add (mixed, spread)",
        ]
    else:
        lines.append("Y = Add (mixed, spatial)")
    return lines


@register_operator("linear-mix")
@dataclass(frozen=True)
class LinearMix(OperatorConfig):
    """LinearMix as a rule's target: ``linear-mix(extend=false)``."""

    summary: ClassVar[str] = "a depthwise and a 1x1 convolution, added"
    formula: ClassVar[str] = "K_dw ∗ x + Mx"
    source: ClassVar[str] = "Low-cost parameterizations, eq. 7"
    starts: ClassVar[dict[str, str]] = {"fit": "fitted", "project": "none", "random": "none"}
    leaves_gain: ClassVar[bool] = False
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "LinearMix2d",
        "linear_mix2d",
        ("input", "weight", "bias", "mix"),
        ("shared",),
        _overload,
        _body,
        strings=("outputs",),
        window={"kernel_size": "kernel_shape", **CONV_ATTRIBUTES},
    )

    extend: bool = option(False, "also stand where channels differ or are grouped, which the paper has not", kind=bool)

    def refuses(self, site: Site) -> str | None:
        geometry = site.geometry
        square = geometry.in_channels == geometry.out_channels
        if square and geometry.groups == 1:
            return None
        if not self.extend:
            what = (
                f"groups={geometry.groups}" if square else f"{geometry.in_channels} to {geometry.out_channels} channels"
            )
            return f"{what}: as many outputs as inputs and no groups, unless extend=true"
        return None

    def cost(self, site: Site) -> Cost:
        geometry = site.geometry
        shared = min(geometry.in_channels, geometry.out_channels)
        taps = shared * math.prod(geometry.kernel_size)
        mix = geometry.out_channels * geometry.in_channels // geometry.groups
        return Cost(taps + mix + geometry.out_channels * geometry.bias, (taps + mix) * site.positions)

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        layer = LinearMix2d(**conv_options(conv), device=conv.weight.device, dtype=conv.weight.dtype)
        if start.name == "random":
            layer.reset_parameters(torch.Generator().manual_seed(int(start.value or 0)))
        else:
            layer.bias = conv.bias
            if not conv.weight.is_meta:
                layer.project(conv.weight.detach())
        for parameter in (layer.weight, layer.mix):
            parameter.requires_grad_(conv.weight.requires_grad)
        if layer.bias is not None and conv.bias is not None and layer.bias is not conv.bias:
            layer.bias.requires_grad_(conv.bias.requires_grad)
        return Built(layer.train(conv.training))
