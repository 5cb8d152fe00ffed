"""Local binary convolution: y_t = Σ_i W_ti·relu(b_i ∗ x), fixed sparse ternary filters b and a learned 1x1 mix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsurgery.errors import ArgumentError
from convsurgery.geometry import ConvGeometry, Cost, Pair, Site, pair
from convsurgery.operators import noise as random
from convsurgery.operators.activations import ACTIVATIONS, activation
from convsurgery.operators.base import Built, Fitter, OperatorConfig, Start, option, register_operator
from convsurgery.operators.layer import conv_options
from convsurgery.operators.library import define_op
from convsurgery.operators.mix import MixFit, MixLayer
from convsurgery.operators.onnx import NodeForm, OnnxFunction
from convsurgery.operators.precision import no_grad_needed, result_dtype
from convsurgery.operators.ridge import RIDGE

__all__ = ["Lbc", "LocalBinaryConv2d", "local_binary_conv"]


def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filters: Tensor,
    act: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    dtype = result_dtype(x)
    maps = F.conv2d(x.to(dtype), filters.to(dtype), None, stride, padding, dilation, groups)
    a = activation(maps, act, inplace=no_grad_needed(x, filters) or act == "relu")
    return F.conv2d(a, weight.to(dtype), None if bias is None else bias.to(dtype), groups=groups)


define_op(
    "local_binary_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor filters, str act, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
    _op,
)


def local_binary_conv(
    input: Tensor,
    weight: Tensor,
    filters: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    act: str = "relu",
) -> Tensor:
    """A convolution with fixed filters, a nonlinearity, and a 1x1 mix: ``Σ_i weight_ti · act(filters_i ∗ input)``.

    Juefei-Xu et al., *Perturbative Neural Networks* (2018), eq. 1; their *Local Binary Convolutional Neural Networks*
    (2017).

    Args:
        input: (N, C_in, H, W) or (C_in, H, W).
        weight: (C_out, m / groups, 1, 1), the mix.
        filters: (m, C_in / groups, kh, kw), of -1, 0 and 1.
        bias: (C_out,).
        stride, padding, dilation, groups: of the convolution, in pixels; the mix has the same groups.
        act: name of the activation, as timm names them.

    Returns:
        (N, C_out, H', W').

    Raises:
        ValueError: for an unknown activation, and a mix that does not fit the filters.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> x, b = torch.randn(1, 3, 8, 8), torch.randint(-1, 2, (16, 3, 3, 3)).float()
        >>> CF.local_binary_conv(x, torch.randn(4, 16, 1, 1), b, padding=1).shape
        torch.Size([1, 4, 8, 8])
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; known: {', '.join(sorted(ACTIVATIONS))}")
    if weight.shape[1] * groups != filters.shape[0]:
        raise ValueError(f"weight mixes {weight.shape[1] * groups} maps, there are {filters.shape[0]} filters")
    out: Tensor = torch.ops.convsurgery.local_binary_conv2d(
        input, weight, bias, filters, act, pair(stride), pair(padding), pair(dilation), groups
    )
    return out


class LocalBinaryConv2d(MixLayer):
    """Layer form of :func:`local_binary_conv`; options as :class:`torch.nn.Conv2d`.

    Args:
        filters: m, a multiple of the groups; the output channels when absent.
        sparsity: share of zeros in each filter, 0 or more and below 1; the rest are signs.
        seed: of the filters; the same on every device and platform.
        act: activation, by timm's names.
        stream: name that gives layers of one seed filters of their own.

    Example:
        >>> import torch
        >>> LocalBinaryConv2d(3, 8, 3, padding=1, filters=32)(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 8, 16, 16])
    """

    filters: Tensor

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
        filters: int | None = None,
        sparsity: float = 0.5,
        seed: int = 0,
        act: str = "relu",
        stream: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        shape = self.take_options(in_channels, out_channels, *options)
        shape = (filters or out_channels, *shape[1:])
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(sorted(ACTIVATIONS))}, not {act!r}")
        if not 0 <= sparsity < 1 or shape[0] % groups:
            raise ValueError(
                f"sparsity must be from 0 to below 1 and filters divisible by groups, not {sparsity} and "
                f"{shape[0]} by {groups}"
            )
        self.sparsity, self.seed, self.act, self.stream = sparsity, seed, act, stream
        self.weight = nn.Parameter(torch.empty(out_channels, shape[0] // groups, 1, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        fixed = torch.empty(shape, device=device, dtype=dtype)
        if not fixed.is_meta:
            fixed.copy_(random.ternary(shape, seed, sparsity, stream))
        self.register_buffer("filters", fixed)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw mix and bias so that the output has the size a :class:`torch.nn.Conv2d` draws."""
        patch = math.prod(self.filters.shape[1:])
        signs = patch - min(int(self.sparsity * patch), patch - 1)
        scale = 1 / math.sqrt(max(1, self.weight.shape[1]))
        for parameter, bound in ((self.weight, scale / math.sqrt(signs)), (self.bias, scale)):
            if parameter is not None and not parameter.is_meta:
                with torch.no_grad():
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, input: Tensor) -> Tensor:
        x, padding = self._padded(input)
        window = (self.stride, padding, self.dilation, self.groups)
        out: Tensor = torch.ops.convsurgery.local_binary_conv2d(
            x, self.weight, self.bias, self.filters, self.act, *window
        )
        return out

    def _padded(self, input: Tensor) -> tuple[Tensor, Pair]:
        """The input padded where the op cannot, and the padding left to the op."""
        left, right, top, bottom = self.geometry.padding
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return input, (top, left)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, [left, right, top, bottom], mode), (0, 0)

    def features(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            x, padding = self._padded(input)
            maps = F.conv2d(x, self.filters, None, self.stride, padding, self.dilation, self.groups)
            return ACTIVATIONS[self.act].function(maps)

    def fitter(self, conv: nn.Conv2d, ridge: float | None = None, *, shift: bool = False) -> Fitter:
        return MixFit(self, RIDGE if ridge is None else ridge, shift=shift)

    def project(self, conv_weight: Tensor) -> None:
        """The best mix for white Gaussian inputs, in closed form: features are rectified Gaussians.

        E[relu(b·x) relu(b'·x)] = ‖b‖‖b'‖ (sin θ + (π − θ) cos θ) / 2π with θ the angle between b and b' (Cho and Saul
        2009, eq. 6), E[relu(b·x)] = ‖b‖/√2π, and E[relu(b·x) w·x] = b·w / 2.
        """
        b = self.filters.detach().double().flatten(1).unflatten(0, (self.groups, -1))
        w = conv_weight.detach().double().flatten(1).unflatten(0, (self.groups, -1))
        norms = b.norm(dim=2)
        lengths = norms.unsqueeze(2) * norms.unsqueeze(1)
        cosine = (b @ b.mT / lengths).clamp(-1, 1)
        angle = cosine.acos()
        second = lengths * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)
        covariance = second - lengths / (2 * math.pi)
        covariance = covariance + torch.eye(b.shape[1]).to(b) * RIDGE * covariance.diagonal(dim1=1, dim2=2).mean()
        mix = torch.linalg.solve(covariance, b @ w.mT / 2)
        with torch.no_grad():
            self.weight.copy_(mix.mT.flatten(0, 1)[..., None, None])
            if self.bias is not None:
                # The features have a mean, a convolution's output has none.
                mean = (norms.unsqueeze(1) @ mix).flatten() / math.sqrt(2 * math.pi)
                self.bias = nn.Parameter((self.bias.double() - mean).to(self.bias), self.bias.requires_grad)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, filters={self.filters.shape[0]}, sparsity={self.sparsity:g}"
        text += f", groups={self.groups}" if self.groups != 1 else ""
        return f"{text}, act={self.act}"


def _overload(form: NodeForm) -> str:
    return "_".join([form.words["act"], *(["bias"] if "bias" in form else [])])


def _body(form: NodeForm) -> list[str]:
    bias = ", bias" if "bias" in form else ""
    return [
        "z = Conv <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group> "
        "(X, filters)",
        *ACTIVATIONS[form.words["act"]].onnx,
        "Y = Conv <dilations = [1, 1], group: int = @group, kernel_shape = [1, 1], pads = [0, 0, 0, 0], "
        f"strides = [1, 1]> (a, W{bias})",
    ]


#: filters of a group: a start solves for as many unknowns
_MOST = 8192
#: bytes of a layer's filters and mix
_LARGEST = 1 << 30


@register_operator("lbc")
@dataclass(frozen=True)
class Lbc(OperatorConfig):
    """Local binary convolution as a rule's target: ``lbc(filters=none, sparsity=0.5, seed=0, act=relu)``."""

    summary: ClassVar[str] = "fixed sparse ternary filters, a nonlinearity and a 1x1 mix"
    formula: ClassVar[str] = "Σ Wᵢ·relu(bᵢ ∗ x)"
    source: ClassVar[str] = "Juefei-Xu et al. 2018, eq. 1"
    starts: ClassVar[dict[str, str]] = {"fit": "fitted", "project": "none", "random": "none"}
    leaves_gain: ClassVar[bool] = False
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "LocalBinaryConv2d",
        "local_binary_conv2d",
        ("input", "weight", "bias", "filters"),
        (),
        _overload,
        _body,
        strings=("act",),
    )

    filters: int | None = option(None, "how many, a multiple of the groups; the output channels when absent", kind=int,
                                 least=1, choices=(None,))  # fmt: skip
    sparsity: float = option(0.5, "share of zeros in each filter, below 1", kind=float, least=0)
    seed: int = option(0, "of the filters; each layer has its own by its name", kind=int, least=0)
    act: str = option("relu", "activation, by timm's names", kind=(), choices=tuple(ACTIVATIONS))

    def validate(self) -> None:
        if self.sparsity >= 1:
            raise ArgumentError("sparsity", f"sparsity wants a number >= 0 and below 1, not {self.sparsity:g}")
        if self.seed >= 2**63:
            raise ArgumentError("seed", "seed wants an integer below 2^63")

    def _filters(self, geometry: ConvGeometry) -> int:
        return self.filters or geometry.out_channels

    def refuses(self, site: Site) -> str | None:
        groups, filters = site.geometry.groups, self._filters(site.geometry)
        if filters % groups:
            below = filters // groups * groups
            legal = f"{below} or {below + groups}" if below else str(groups)
            return f"filters={filters} is no multiple of its {groups} groups; nearest: {legal}"
        if filters // groups > _MOST:
            return f"filters={filters}: at most {_MOST:,} for each group of channels"
        size = (filters * site.geometry.patch + site.geometry.out_channels * filters // groups) * 4
        if size > _LARGEST:
            return f"its {filters} filters and their mix take {size / 2**20:,.0f} MiB; at most {_LARGEST >> 20:,}"
        return None

    def refuses_start(self, start: str, site: Site | None = None) -> str | None:
        if start == "project" and self.act != "relu":
            return f"its closed form is for relu, not for {self.act}"
        return None

    def cost(self, site: Site) -> Cost:
        geometry, filters = site.geometry, self._filters(site.geometry)
        mix = geometry.out_channels * filters // geometry.groups
        signs = geometry.patch - min(int(self.sparsity * geometry.patch), geometry.patch - 1)
        return Cost(mix + geometry.out_channels * geometry.bias, (mix + filters * signs) * site.positions)

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        layer = LocalBinaryConv2d(
            **conv_options(conv),
            filters=self.filters,
            sparsity=self.sparsity,
            seed=self.seed,
            act=self.act,
            stream="" if site is None else site.name,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        if start.name != "random":
            layer.bias = conv.bias
        if not conv.weight.is_meta:
            if start.name == "random":
                layer.reset_parameters(torch.Generator().manual_seed(int(start.value or 0)))
            elif self.act == "relu":
                layer.project(conv.weight)
        layer.weight.requires_grad_(conv.weight.requires_grad)
        if layer.bias is not None and conv.bias is not None and layer.bias is not conv.bias:
            layer.bias.requires_grad_(conv.bias.requires_grad)
        return Built(layer.train(conv.training))
