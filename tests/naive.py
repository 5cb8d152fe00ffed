"""The operators from their formulas: an explicit patch matrix, float64, nothing shared with the package.

Slow and hungry on purpose; no test may take its expected values from anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import get_act_fn
from torch import Tensor, nn

#: κ(x, w, h): windows x (N, g, 1, P, L) and filters w (1, g, C_out/g, P, 1), hyperparameter h broadcasting over
#: (N, g, C_out/g, L), give (N, g, C_out/g, L)
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def linear(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
    return (x * w).sum(3)


def l1(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
    return (x - w).abs().sum(3)


def l2(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
    return (x - w).pow(2).sum(3).sqrt()


def sigmoid(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
    return (x * w).sum(3).tanh()


def gauss(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
    return (-h * (x - w).pow(2).sum(3)).exp()


def poly(degree: int) -> Kernel:
    def kernel(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
        return ((x * w).sum(3) + h).pow(degree)

    return kernel


class Dial(NamedTuple):
    """What a dialled kernel has to compute, on numpy arrays of extended precision.

    Attributes:
        value: F_ε of windows and filters as for a kernel, of ε other than 0, of the hyperparameter at the start, and of
            what training has multiplied it by.
        slope: of that factor, what F_0 is of wᵀx.
    """

    value: Callable[[Any, Any, Any, Any, Any], Any]
    slope: Callable[[Any], Any] = np.ones_like


def dial_poly(degree: int) -> Dial:
    """The paper's kernel on filters εw, less its response to an empty window, over d·c^(d−1)·ε, c as at the start."""

    def value(x: Any, w: Any, e: Any, h: Any, change: Any) -> Any:
        c = h * change
        return (((x * w).sum(3) * e + c) ** degree - c**degree) / (degree * h ** (degree - 1) * e)

    return Dial(value, lambda change: change ** (degree - 1))


def _dialled_gauss(x: Any, w: Any, e: Any, kappa: Any, change: Any) -> Any:
    """The paper's kernel with γ = κε² and filters w / (2κε) is A (1 + ε F), A its response to an empty window."""
    gamma, filters = change * kappa * e**2, w / (2 * kappa * e)[:, :, :, None]
    empty = np.exp(-gamma * (filters**2).sum(3))
    return (np.exp(-gamma * ((x - filters) ** 2).sum(3)) / empty - 1) / e


def _dialled_l2(x: Any, w: Any, e: Any, h: Any, change: Any) -> Any:
    """The distance to filters −w / (ε‖w‖) is (1 + ε F / ‖w‖) / ε."""
    length = np.sqrt((w**2).sum(3))
    filters = -w / (e * length)[:, :, :, None]
    return length * (e * np.sqrt(((x - filters) ** 2).sum(3)) - 1) / e


dial_sigmoid = Dial(lambda x, w, e, h, change: np.tanh((x * w).sum(3) * e) / e)
dial_gauss = Dial(_dialled_gauss, lambda change: change)
dial_l2 = Dial(_dialled_l2)


def patches(x: Tensor, layer: nn.Module) -> tuple[Tensor, tuple[int, int]]:
    """All windows of a batch, (N, C_in·kh·kw, L), and the output's height and width."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if layer.padding == "same":
        before = [r // 2 for r in reach]
        after = [r - r // 2 for r in reach]
    else:
        before = after = [0, 0] if layer.padding == "valid" else list(layer.padding)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, [before[1], after[1], before[0], after[0]], mode)
    size = tuple((padded.shape[2 + i] - reach[i] - 1) // stride[i] + 1 for i in (0, 1))
    return F.unfold(padded, kernel, dilation=dilation, stride=stride), size


def _by_output(constant: Tensor | None, groups: int, channels: int, absent: float) -> Tensor:
    """A constant, () or (C_out,), as (g, C_out/g, 1) or something that broadcasts to it."""
    if constant is None:
        return torch.tensor(absent, dtype=torch.float64)
    return constant.detach().double().expand(channels).reshape(groups, channels // groups, 1)


def kervolve(kernel: Kernel, layer: nn.Module, x: Tensor, hyper: Tensor | None = None) -> Tensor:
    """``g·[κ(x, a·w) − κ(0, a·w)] + b`` of a layer's own state; the subtraction only where it is centred."""
    if x.dim() == 3:
        return kervolve(kernel, layer, x.unsqueeze(0), hyper).squeeze(0)
    groups, channels = layer.groups, layer.out_channels
    columns, (height, width) = patches(x.detach().double(), layer)
    windows = columns.unflatten(1, (groups, 1, -1))
    filters = layer.weight.detach().double().reshape(1, groups, channels // groups, -1, 1)
    filters = filters * _by_output(getattr(layer, "scale", None), groups, channels, 1).unsqueeze(-1)
    h = _by_output(hyper, groups, channels, 0)
    y = kernel(windows, filters, h)
    if getattr(layer, "centered", False):
        y = y - kernel(torch.zeros_like(windows[..., :1]), filters, h)
    y = y * _by_output(getattr(layer, "gain", None), groups, channels, 1)
    for term in (layer.bias, getattr(layer, "offset", None)):
        y = y + _by_output(term, groups, channels, 0)
    return y.reshape(x.shape[0], channels, height, width)


def dialled(dial: Dial, layer: nn.Module, x: Tensor) -> Tensor:
    """``g·F_ε + b`` of a dialled layer's own state, by the paper's definitions and where ε is 0 by the convolution."""
    if x.dim() == 3:
        return dialled(dial, layer, x.unsqueeze(0)).squeeze(0)
    groups, channels = layer.groups, layer.out_channels
    columns, (height, width) = patches(x.detach().double(), layer)
    windows = columns.unflatten(1, (groups, 1, -1))
    filters = layer.weight.detach().double().reshape(1, groups, channels // groups, -1, 1)
    log = getattr(layer, layer.log_name) if layer.log_name in layer._parameters else None
    eps = _by_output(layer.eps, groups, channels, 0)
    hyper = _by_output(layer._buffers.get(layer.hyper_name), groups, channels, 1)
    change = _by_output(None if log is None else log.exp(), groups, channels, 1)
    still = eps == 0
    shape = (1, groups, channels // groups, 1)
    constants = (torch.where(still, 1.0, eps), hyper, change)
    wide = [
        t.numpy().astype(np.longdouble)
        for t in (windows, filters, *(t.expand(shape[1:]).view(shape) for t in constants))
    ]
    y = torch.from_numpy(dial.value(*wide).astype(np.float64))
    limit = linear(windows, filters, hyper) * torch.from_numpy(dial.slope(wide[4]).astype(np.float64))
    y = torch.where(still, limit, y) * _by_output(layer.gain, groups, channels, 1)
    for term in (layer.bias, layer.offset):
        y = y + _by_output(term, groups, channels, 0)
    return y.reshape(x.shape[0], channels, height, width)


def convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """The convolution with the layer's weights in float64, by the same patch matrix."""
    return kervolve(linear, layer, x)


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted value."""
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    difference = (got.detach().double() - wanted.detach().double()).abs().max()
    return float(difference / wanted.detach().abs().max())


def lay_out(layer: nn.Module, size: tuple[int, int]) -> list[tuple[list[list[int]], list[list[int]]]]:
    """For rows and columns: the padded image's pixels behind each output of a perturbation layer, and their masks.

    A window of as many pixels as the stride, but no more than the convolution's, its middle under the convolution's
    middle; half a pixel goes to whichever side begins nearer to pixel 0.
    """
    found = []
    for i in (0, 1):
        k, s, d = layer.kernel_size[i], layer.stride[i], layer.dilation[i]
        reach = d * (k - 1)
        if layer.padding == "same":
            before, after = reach // 2, reach - reach // 2
        else:
            before = after = 0 if layer.padding == "valid" else layer.padding[i]
        outputs = (size[i] + before + after - reach - 1) // s + 1
        window = min(s, reach + 1)
        middle = reach / 2 - before  # of the first window, in pixels of the image
        first = middle - (window - 1) / 2
        start = min((math.floor(first), math.ceil(first)), key=abs)
        pixels = [[start + o * s + u + before for u in range(window)] for o in range(outputs)]
        places = [[o if window == 1 else o * s + u for u in range(window)] for o in range(outputs)]
        found.append((pixels, places))
    return found


def perturb(layer: nn.Module, x: Tensor) -> Tensor:
    """``Σ V·act(N + x) + b`` of a perturbation layer, each output from its own pixels."""
    if x.dim() == 3:
        return perturb(layer, x.unsqueeze(0)).squeeze(0)
    x = x.detach().double()
    if layer.padding == "same":
        reach = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        pads = [reach[1] // 2, reach[1] - reach[1] // 2, reach[0] // 2, reach[0] - reach[0] // 2]
    else:
        both = (0, 0) if layer.padding == "valid" else layer.padding
        pads = [both[1], both[1], both[0], both[0]]
    padded = F.pad(x, pads, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    (rows, row_places), (columns, column_places) = lay_out(layer, (x.shape[2], x.shape[3]))
    pixels = padded[:, :, torch.tensor(rows)][..., torch.tensor(columns)]  # (N, C, OH, wh, OW, ww)
    z = pixels.unsqueeze(2)
    masks = layer.masks
    if masks is not None:
        masks = masks.detach().double()
        wanted = [max(max(place) for place in places) + 1 for places in (row_places, column_places)]
        nearest = [
            torch.tensor([int((p + 0.5) * have / want) for p in range(want)])
            for have, want in zip(masks.shape[2:], wanted, strict=True)
        ]
        masks = masks[:, :, nearest[0]][..., nearest[1]]
        masks = masks[:, :, torch.tensor(row_places)][..., torch.tensor(column_places)]
        z = z + masks
    a = get_act_fn(layer.act)(z) if layer.act != "identity" else z
    if layer.centered and masks is not None:
        a = a - masks
    a = a.flatten(1, 2).unflatten(1, (layer.groups, -1))
    mix = layer.weight.detach().double().flatten(1).unflatten(0, (layer.groups, -1))
    y = torch.einsum("gok,ngkhuwv->ngohuwv", mix, a).flatten(1, 2)
    y = y.amax((3, 5)) if layer.pool == "max" else y.mean((3, 5))
    return y if layer.bias is None else y + layer.bias.detach().double().view(-1, 1, 1)


def local_binary(layer: nn.Module, x: Tensor) -> Tensor:
    """``Σ W·act(b ∗ x) + bias``, by the patch matrix."""
    if x.dim() == 3:
        return local_binary(layer, x.unsqueeze(0)).squeeze(0)
    columns, (height, width) = patches(x.detach().double(), layer)
    windows = columns.unflatten(1, (layer.groups, -1))
    filters = layer.filters.detach().double().flatten(1).unflatten(0, (layer.groups, -1))
    maps = get_act_fn(layer.act)(torch.einsum("gmp,ngpl->ngml", filters, windows))
    mix = layer.weight.detach().double().flatten(1).unflatten(0, (layer.groups, -1))
    y = torch.einsum("gom,ngml->ngol", mix, maps).flatten(1, 2).unflatten(2, (height, width))
    return y if layer.bias is None else y + layer.bias.detach().double().view(-1, 1, 1)


def linear_mixed(layer: nn.Module, x: Tensor) -> Tensor:
    """``K_dw ∗ x + M x + b``: the patch matrix of every channel, and its column for the middle tap."""
    if x.dim() == 3:
        return linear_mixed(layer, x.unsqueeze(0)).squeeze(0)
    columns, size = patches(x.detach().double(), layer)
    kh, kw = layer.kernel_size
    windows = columns.unflatten(1, (layer.groups, -1, kh * kw))  # (N, g, C_in/g, taps, L)
    middle = windows[:, :, :, (kh - 1) // 2 * kw + (kw - 1) // 2]
    mix = layer.mix.detach().double().flatten(1).unflatten(0, (layer.groups, -1))
    y = torch.einsum("gok,ngkl->ngol", mix, middle)
    each = min(y.shape[2], windows.shape[2])
    kernels = layer.weight.detach().double().flatten(1).unflatten(0, (layer.groups, each))
    y[:, :, :each] += torch.einsum("gct,ngctl->ngcl", kernels, windows[:, :, :each])
    y = y.flatten(1, 2).unflatten(2, size)
    return y if layer.bias is None else y + layer.bias.detach().double().view(-1, 1, 1)
