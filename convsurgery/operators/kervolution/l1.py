"""Manhattan kervolution: ‖x − w‖₁, Wang et al. 2019, eq. 9a."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.geometry import Site
from convsurgery.operators.base import Built, Fitter, OperatorConfig, Start, register_operator
from convsurgery.operators.kervolution import _onnx as text
from convsurgery.operators.kervolution._call import functional_call, schema
from convsurgery.operators.kervolution._conv import affine, overwritable
from convsurgery.operators.kervolution._fitting import AffineFit, ScaleFit
from convsurgery.operators.kervolution._layer import Kervolution2d, power_of_two
from convsurgery.operators.library import LIBRARY, batch_optional
from convsurgery.operators.onnx import NodeForm, OnnxFunction
from convsurgery.operators.precision import result_dtype, transformed, widened

__all__ = ["KervL1", "L1Kervolution2d", "kerv_l1"]

#: Output values worked on at a time, small enough for a core's cache; working memory is a small multiple of this.
BLOCK = 1 << 19

#: filters beside inputs of unit size, where there are no data to say
_LARGE = 4.0


def _output_size(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any) -> tuple[int, int]:
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return height, width


def _blocks(x: Tensor, channels: int, size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Images and output rows of each block: as many as keep ``channels`` maps of it near ``BLOCK`` values."""
    row = channels * size[1]
    rows = max(1, min(size[0], BLOCK // max(1, row)))
    images = max(1, BLOCK // max(1, row * size[0])) if rows == size[0] else 1
    for first in range(0, x.shape[0], images):
        for top in range(0, size[0], rows):
            yield slice(first, first + images), slice(top, min(top + rows, size[0]))


def _taps(
    padded: Tensor, w: Tensor, size: tuple[int, int], stride: Any, dilation: Any, block: tuple[slice, slice]
) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """Each place under the window, (channel, row, column), and a view of what the block's windows hold there.

    ``padded`` has one group's channels; the view is (images, rows, W_out).
    """
    images, rows = block
    for channel in range(w.shape[1]):
        for i in range(w.shape[2]):
            for j in range(w.shape[3]):
                top, left = rows.start * stride[0] + i * dilation[0], j * dilation[1]
                bottom = top + (rows.stop - rows.start - 1) * stride[0] + 1
                right = left + (size[1] - 1) * stride[1] + 1
                yield (channel, i, j), padded[images, channel, top : bottom : stride[0], left : right : stride[1]]


def _groups(padded: Tensor, w: Tensor, groups: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each group its output channels, its part of the input and its filters."""
    filters = w.shape[0] // groups
    for group in range(groups):
        out = slice(group * filters, (group + 1) * filters)
        yield out, padded.narrow(1, group * w.shape[1], w.shape[1]), w[out]


def _pad(x: Tensor, padding: Any) -> Tensor:
    return F.pad(x, [padding[1], padding[1], padding[0], padding[0]])


def _distance(x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Tensor:
    """One place under the window after the other: |x_tap − w_tap| of all channels is added to the block's sums."""
    size = _output_size(x, w, stride, padding, dilation)
    out = x.new_empty((x.shape[0], w.shape[0], *size))
    for channels, part, filters in _groups(_pad(x, padding), w, groups):
        columns = filters.flatten(1).t().unsqueeze(2).contiguous()
        for block in _blocks(x, len(filters), size):
            sums = difference = None
            for column, (_, tap) in zip(columns, _taps(part, filters, size, stride, dilation, block), strict=True):
                values = tap.reshape(-1)
                if sums is None:
                    sums = torch.sub(values, column).abs_()
                    difference = torch.empty_like(sums)
                else:
                    sums.add_(torch.sub(values, column, out=difference).abs_())
            assert sums is not None
            into = out[block[0], channels, block[1]]
            into.copy_(sums.view(into.shape[1], into.shape[0], *into.shape[2:]).transpose(0, 1))
    return out


def _distance_backward(
    grad: Tensor, x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    """∂/∂w = −Σ sign(x − w)·grad over positions, ∂/∂x = Σ sign(x − w)·grad over channels, place after place."""
    size = (grad.shape[2], grad.shape[3])
    padded = _pad(x, padding)
    grad_padded, grad_w = torch.zeros_like(padded), torch.zeros_like(w, memory_format=torch.contiguous_format)
    parts = zip(_groups(padded, w, groups), _groups(grad_padded, grad_w, groups), strict=True)
    for (channels, part, filters), (_, grad_part, grad_filters) in parts:
        columns = filters.flatten(1).t().unsqueeze(2).contiguous()
        for block in _blocks(x, len(filters), size):
            outer = grad[block[0], channels, block[1]].transpose(0, 1).flatten(1)
            signs = torch.empty_like(outer)
            taps = _taps(part, filters, size, stride, dilation, block)
            grad_taps = _taps(grad_part, filters, size, stride, dilation, block)
            for column, (place, tap), (_, grad_tap) in zip(columns, taps, grad_taps, strict=True):
                torch.sub(tap.reshape(-1), column, out=signs).sign_().mul_(outer)
                grad_filters[(slice(None), *place)] -= signs.sum(1)
                grad_tap += signs.sum(0).view(tap.shape)
    inside = grad_padded[:, :, padding[0] : padding[0] + x.shape[2], padding[1] : padding[1] + x.shape[3]]
    return inside.clone(memory_format=torch.contiguous_format), grad_w


def _plain_distance(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """The same made of torch's own operations, which ``torch.func`` and forward mode follow; more memory and time."""
    size = _output_size(x, w, stride, padding, dilation)
    whole = (slice(None), slice(0, size[0]))
    out = []
    for _, part, filters in _groups(_pad(x, padding), w, groups):
        taps = _taps(part, filters, size, stride, dilation, whole)
        out.append(sum((tap.unsqueeze(1) - filters[:, c, i, j].view(-1, 1, 1)).abs() for (c, i, j), tap in taps))
    return torch.cat(out, 1)  # type: ignore[arg-type]


_WINDOW = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
LIBRARY.define(f"l1_distance(Tensor input, Tensor weight, {_WINDOW}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(
    f"l1_distance_backward(Tensor grad, Tensor input, Tensor weight, {_WINDOW}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("l1_distance", _distance, "CompositeExplicitAutograd")
LIBRARY.impl("l1_distance_backward", _distance_backward, "CompositeExplicitAutograd")


def _distance_fake(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0], *_output_size(x, w, stride, padding, dilation)))


def _distance_backward_fake(grad: Tensor, x: Tensor, w: Tensor, *window: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape)


torch.library.register_fake("convsurgery::l1_distance", _distance_fake, lib=LIBRARY)
torch.library.register_fake("convsurgery::l1_distance_backward", _distance_backward_fake, lib=LIBRARY)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.window = inputs[2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w = ctx.saved_tensors
    grad_x, grad_w = torch.ops.convsurgery.l1_distance_backward(grad, x, w, *ctx.window)
    return grad_x, grad_w, None, None, None, None


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError("kerv_l1 has no second derivative: its first is a sum of signs")


torch.library.register_autograd("convsurgery::l1_distance_backward", _no_second, lib=LIBRARY)
torch.library.register_autograd("convsurgery::l1_distance", _backward, setup_context=_save, lib=LIBRARY)


def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    scale: Tensor | None,
    centered: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    channels = weight.shape[1] * groups
    if x.shape[1] != channels:
        raise RuntimeError(f"kerv_l1: the input has {x.shape[1]} channels, the filters want {channels} channels")
    if min(_output_size(x, weight, stride, padding, dilation)) < 1:
        size, window = tuple(x.shape[2:]), tuple(weight.shape[2:])
        raise RuntimeError(
            f"kerv_l1: an image of {size} with padding {padding} is smaller in size than the window {window}"
        )
    fresh = overwritable(x, weight, bias, gain, scale)
    w = widened(weight)
    if scale is not None:
        w = w * (scale if scale.dim() == 0 else scale.view(-1, 1, 1, 1))
    distance = _plain_distance if transformed() else torch.ops.convsurgery.l1_distance
    y = distance(widened(x), w, stride, padding, dilation, groups)
    if centered:
        y = y - w.abs().sum((1, 2, 3)).view(-1, 1, 1)
    return affine(y, gain, bias, fresh).to(result_dtype(x))


LIBRARY.define("kerv_l1" + schema("", ""), tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("kerv_l1", batch_optional(_op), "CompositeImplicitAutograd")


def kerv_l1(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    centered: bool = False,
    gain: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Manhattan kervolution, ``‖x − w‖₁ + bias`` for every window.

    Wang et al., *Kervolutional Neural Networks* (2019), eq. 9a. No convolution computes it: the places under the window
    are gone through one after the other, on blocks of the output small enough for the cache. Working memory is two
    such blocks, whatever the image, the window or the number of filters. Many times slower than a convolution (see
    docs/performance.md). Shapes, options and constants as :func:`~convsurgery.functional.kerv_poly`.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> CF.kerv_l1(torch.zeros(1, 1, 2, 2), torch.ones(2, 1, 2, 2)).flatten()
        tensor([4., 4.])
    """
    return functional_call(
        torch.ops.convsurgery.kerv_l1,
        (input, weight, bias, gain, scale, centered),
        (stride, padding, dilation, groups),
    )


class L1Kervolution2d(Kervolution2d):
    """Layer form of :func:`kerv_l1`; options as :class:`torch.nn.Conv2d`."""

    op_name = "kerv_l1"

    def fitter(self, conv: nn.Conv2d, ridge: float | None = None, *, shift: bool = False) -> Fitter:
        """Fits gain and offset, and where it began by ``fit`` the filters' scale."""
        return ScaleFit(self) if self.centered else AffineFit(self)

    def binarise(self) -> None:
        """Without data: filters so large that ‖x − aw‖₁ − ‖aw‖₁ is nearly −sign(w)ᵀx, times −mean |w|.

        That is the nearest to wᵀx that signs can give; inputs of about unit size are assumed.
        """
        w = self.weight.detach().double()
        self.scale = self.constant(power_of_two(_LARGE / max(float(w.square().mean().sqrt()), 1e-12)))
        self.gain = self.constant(-w.abs().mean((1, 2, 3)))


def _body(form: NodeForm) -> list[str]:
    """A Loop over the values under the window: each adds |x_tap − w_tap| to (N, groups, C_out/groups, H, W)."""
    lines = [
        "pads = Constant <value_ints: ints = @pads> ()",
        "strides = Constant <value_ints: ints = @strides> ()",
        "dilations = Constant <value_ints: ints = @dilations> ()",
        "group_count = Constant <value_int: int = @group> ()",
        "zeros2 = Constant <value_ints = [0, 0]> ()",
        "i0 = Constant <value_ints = [0]> ()",
        "i1 = Constant <value_ints = [1]> ()",
        "i2 = Constant <value_ints = [2]> ()",
        "i4 = Constant <value_ints = [4]> ()",
        "minus1 = Constant <value_ints = [-1]> ()",
        "axes = Constant <value_ints = [1, 2, 3]> ()",
        "pads_begin = Slice (pads, i0, i2)",
        "pads_end = Slice (pads, i2, i4)",
        "pads_full = Concat <axis = 0> (zeros2, pads_begin, zeros2, pads_end)",
        text.number("nil", 0.0),
        "padded = Pad (X, pads_full, nil)",
        "group_row = Reshape (group_count, i1)",
        "batch = Shape <start = 0, end = 1> (X)",
        "padded_size = Shape <start = 2> (padded)",
        "padded_channels = Shape <start = 1, end = 2> (padded)",
        "w_channels = Shape <start = 1, end = 2> (W)",
        "w_size = Shape <start = 2> (W)",
        "w_width = Shape <start = 3> (W)",
        "w_less = Sub (w_size, i1)",
        "reach = Mul (dilations, w_less)",
        "room_plus = Sub (padded_size, reach)",
        "room = Sub (room_plus, i1)",
        "steps_less = Div (room, strides)",
        "size = Add (steps_less, i1)",
        "span_less = Mul (steps_less, strides)",
        "span = Add (span_less, i1)",
        "area = ReduceProd <keepdims = 1> (w_size)",
        "taps_row = Mul (area, w_channels)",
        "taps = Squeeze (taps_row)",
        "filter_rows = Flatten <axis = 1> (W)",
        "by_tap = Transpose <perm = [1, 0]> (filter_rows)",
        "filters_shape = Concat <axis = 0> (group_row, minus1, i1, i1)",
        "out_channels = Shape <start = 0, end = 1> (W)",
        "group_filters = Div (out_channels, group_row)",
        "sum_shape = Concat <axis = 0> (batch, group_row, group_filters, size)",
        "empty = Expand (nil, sum_shape)",
        "slice_steps = Concat <axis = 0> (w_channels, strides)",
        "always = Constant <value_int = 1> ()",
        "yes = Cast <to = 9> (always)",
    ]
    loop = [
        "tap_row = Reshape (tap, i1)",
        "channel = Div (tap_row, area)",
        "inside = Mod (tap_row, area)",
        "row = Div (inside, w_width)",
        "column = Mod (inside, w_width)",
        "place = Concat <axis = 0> (row, column)",
        "begin_space = Mul (place, dilations)",
        "end_space = Add (begin_space, span)",
        "begin = Concat <axis = 0> (channel, begin_space)",
        "end = Concat <axis = 0> (padded_channels, end_space)",
        "x_tap = Slice (padded, begin, end, axes, slice_steps)",
        "x_groups = Unsqueeze (x_tap, i2)",
        "w_flat = Gather <axis = 0> (by_tap, tap)",
        "w_tap = Reshape (w_flat, filters_shape)",
        "difference = Sub (x_groups, w_tap)",
        "distance = Abs (difference)",
        "sum_out = Add (sum_in, distance)",
        "going = Identity (go)",
    ]
    body = "{ " + " ".join(loop) + " }"
    lines.append(
        "sums = Loop (taps, yes, empty) <body = per_tap (int64 tap, bool go, float[n, g, c, h, w] sum_in)"
        f" => (bool going, float[n, g, c, h, w] sum_out) {body}>"
    )
    lines += ["y_shape = Concat <axis = 0> (batch, out_channels, size)", "dist = Reshape (sums, y_shape)"]
    result = "dist"
    if form.centered:
        lines += ["w_abs = Abs (W)", "w_axes = Constant <value_ints = [1, 2, 3]> ()"]
        lines += ["w_sums = ReduceSum <keepdims = 0> (w_abs, w_axes)", text.channel("w_map", "w_sums")]
        lines.append("centred = Sub (dist, w_map)")
        result = "centred"
    return text.statements(lines, text.affine(result, form))


@register_operator("kerv-l1")
@dataclass(frozen=True)
class KervL1(OperatorConfig):
    """Manhattan kervolution as a rule's target: ``kerv-l1``.

    It has no neutral setting: beside small filters ‖x − w‖₁ is little but ‖x‖₁, alike for all channels, and of large
    ones it sees only the signs. ``fit`` finds the scale between the two on data, and a gain and an offset for each
    channel; without the response to an empty window, ‖w‖₁, which would move with every step of training.
    """

    summary: ClassVar[str] = "Manhattan distance between window and filter"
    formula: ClassVar[str] = "‖x − w‖₁"
    source: ClassVar[str] = "Wang et al. 2019, eq. 9a"
    starts: ClassVar[dict[str, str]] = {"fit": "fitted", "copy": "none", "random": "none"}
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "L1Kervolution2d", "kerv_l1", ("input", "weight", "bias", "gain"), ("centered",), text.traits, _body
    )

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        layer = L1Kervolution2d.like(conv, centered=start.name == "fit")
        if start.name == "fit" and not conv.weight.is_meta:
            layer.binarise()
        return layer.begin(start, None, absorb=absorb)
