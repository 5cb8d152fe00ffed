"""The perturbation layer as a rule's target, its starts, and what it is in ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from convsurgery.errors import ArgumentError, ConversionError
from convsurgery.geometry import ConvGeometry, Cost, Site, pair
from convsurgery.operators.activations import ACTIVATIONS
from convsurgery.operators.base import Built, OperatorConfig, Start, option, register_operator
from convsurgery.operators.layer import conv_options
from convsurgery.operators.onnx import NodeForm, OnnxFunction
from convsurgery.operators.perturbation.grid import Grid
from convsurgery.operators.perturbation.layer import Perturbation2d

__all__ = ["Pnn"]

#: How far a neutral start without data moves the masks: no activation goes below minus this, and float16 holds it.
_FAR = 2.0**15

#: Assumed correlation of neighbouring pixels, for the start that has no data.
_CORRELATION = 0.5


def projected(weight: Tensor, fanout: int) -> Tensor:
    """The mix (C_out, C_in/g · m, 1, 1) that predicts a convolution from its centre pixel alone.

    For inputs of independent channels, whose pixels correlate by ρ^distance, the best weight of the centre is
    Σ_taps w·ρ^distance; it is split evenly over the masks of a channel.
    """
    distance = torch.zeros(weight.shape[2:], dtype=torch.float64)
    for dim, size in enumerate(weight.shape[2:]):
        offsets = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2).abs()
        distance = distance + (offsets.view(-1, 1) if dim == 0 else offsets.view(1, -1))
    decay = (_CORRELATION**distance).to(weight.device)
    summed = (weight.detach().double() * decay).sum((2, 3)) / fanout
    return summed.repeat_interleave(fanout, 1).to(weight.dtype)[..., None, None]


def _overload(form: NodeForm) -> str:
    words = [form.words["act"]]
    words += ["fan"] if form.attributes["fanout"] != 1 else []
    words += ["centered"] if form.centered else []
    words += [form.words["pool"]] if form.words["pool"] != "none" else []
    return "_".join([*words, *(name for name in ("masks", "bias") if name in form)])


def _body(form: NodeForm) -> list[str]:
    act = ACTIVATIONS[form.words["act"]].onnx
    fan, noisy = form.attributes["fanout"] != 1, "masks" in form
    lines: list[str] = []
    x, mask = "X", "masks"
    if noisy:
        # A fan of one needs no dimension of its own, and images then broadcast against (C, H, W).
        lines.append(f"axis = Constant <value_ints = [{2 if fan else 1}]> ()")
        x, mask = ("fanned", "masks") if fan else ("X", "mask")
        lines.append("fanned = Unsqueeze (X, axis)" if fan else "mask = Squeeze (masks, axis)")
    if noisy and form.centered and form.words["act"] == "relu":
        lines += [f"negative = Neg ({mask})", f"mixed = Max ({x}, negative)"]
    else:
        lines += [f"z = Add ({x}, {mask})" if noisy else "z = Identity (X)", *act]
        lines.append(f"mixed = Sub (a, {mask})" if noisy and form.centered else "mixed = Identity (a)")
    source = "mixed"
    if fan and noisy:
        lines += [
            "outer = Constant <value_ints = [0, -1]> ()",
            "space = Shape <start = 2> (X)",
            "flat_shape = Concat <axis = 0> (outer, space)",
            "flat = Reshape (mixed, flat_shape)",
        ]
        source = "flat"
    bias = ", bias" if "bias" in form else ""
    pool = {"max": "MaxPool", "avg": "AveragePool"}.get(form.words["pool"])
    result = "y" if pool else "Y"
    lines.append(
        f"{result} = Conv <dilations = [1, 1], group: int = @group, kernel_shape = [1, 1], pads = [0, 0, 0, 0], "
        f"strides = [1, 1]> ({source}, W{bias})"
    )
    if pool:
        lines.append(f"Y = {pool} <kernel_shape: ints = @kernel_shape, strides: ints = @strides> (y)")
    return lines


#: masks of a channel: each is a pass over the image
MOST = 256


@register_operator("pnn")
@dataclass(frozen=True)
class Pnn(OperatorConfig):
    """Perturbation layer as a rule's target: ``pnn(fanout=1, level=0.1, noise=uniform, act=relu)``."""

    summary: ClassVar[str] = "fixed noise, a nonlinearity and a 1x1 mix"
    formula: ClassVar[str] = "Σ Vᵢ·relu(Nᵢ + xᵢ)"
    source: ClassVar[str] = "Juefei-Xu et al. 2018, eq. 2"
    starts: ClassVar[dict[str, str]] = {
        "fit": "fitted",
        "neutral": "exact",
        "project": "none",
        "random": "none",
    }
    leaves_gain: ClassVar[bool] = False
    onnx: ClassVar[OnnxFunction] = OnnxFunction(
        "Perturbation2d",
        "perturbation2d",
        ("input", "weight", "bias", "masks"),
        ("fanout", "centered"),
        _overload,
        _body,
        strings=("act", "pool"),
        window={"kernel_size": "kernel_shape", "stride": "strides", "groups": "group"},
    )

    masks: int | str | None = option(
        None,
        "how many in all, a multiple of the input channels; or what becomes of them at another image size",
        kind=int,
        least=1,
        choices=(None, "resize", "fixed"),
    )
    fanout: int = option(1, "masks for each input channel", kind=int, least=1, most=MOST)
    level: float = option(0.1, "half width of uniform noise, standard deviation of Gaussian", kind=float, above=0)
    noise: str | None = option(
        "uniform", "distribution of the masks; none leaves them out", kind=(), choices=("uniform", "gaussian", None)
    )
    seed: int = option(0, "of the masks; each layer has its own by its name", kind=int, least=0)
    act: str = option("relu", "activation, by timm's names", kind=(), choices=tuple(ACTIVATIONS))
    shared: bool = option(False, "the same masks for all channels", kind=bool)
    trainable: bool = option(False, "whether the masks are trained", kind=bool)
    pool: str = option("max", "what a stride becomes, behind the mix", kind=(), choices=("max", "avg"))
    budget: int = option(1024, "largest size of a layer's masks in MiB", kind=int, least=1)

    def validate(self) -> None:
        if isinstance(self.masks, int) and self.fanout != 1:
            raise ArgumentError("masks", "masks counts all of them, fanout those of a channel: give one of the two")
        if self.seed >= 2**63:
            raise ArgumentError("seed", "seed wants an integer below 2^63")

    def _fanout(self, geometry: ConvGeometry) -> int:
        return self.masks // geometry.in_channels if isinstance(self.masks, int) else self.fanout

    def refuses(self, site: Site) -> str | None:
        channels = site.geometry.in_channels
        if isinstance(self.masks, int) and self.masks % channels:
            below = self.masks // channels * channels
            legal = f"{below} or {below + channels}" if below else str(channels)
            return f"masks={self.masks} is no multiple of its {channels} input channels; nearest: {legal}"
        if self._fanout(site.geometry) > MOST:
            return (
                f"masks={self.masks} are {self._fanout(site.geometry)} for each of {channels} channels; at most {MOST}"
            )
        if site.output_shape is None:
            return "no forward call reaches it, so that the size of its masks is not known"
        return self._over_budget(site)

    def _over_budget(self, site: Site) -> str | None:
        assert site.output_shape is not None
        if self.noise is None:
            return None
        height, width = Grid.of(site.geometry).size((site.output_shape[-2], site.output_shape[-1]))
        channels, fanout = 1 if self.shared else site.geometry.in_channels, self._fanout(site.geometry)
        size = channels * fanout * height * width * (8 if site.dtype == "float64" else 4)
        if size <= self.budget * 2**20:
            return None
        return (
            f"its masks, {channels} x {fanout} x {height} x {width} values, take {size / 2**20:,.0f} MiB; "
            f"budget={self.budget}"
        )

    def note(self, site: Site) -> str | None:
        geometry = site.geometry
        if geometry.pointwise:
            return None
        dilated = geometry.dilation != (1, 1)
        kernel = "x".join(map(str, geometry.kernel_size))
        text = f"pnn sees pixels, not windows: {kernel} {'and the dilation fall' if dilated else 'falls'} away"
        return text + (f", stride becomes {self.pool} pooling" if Grid.of(geometry).window != (1, 1) else "")

    def refuses_start(self, start: str, site: Site | None = None) -> str | None:
        if start != "neutral":
            return None
        if self.act not in ("relu", "identity") and self.noise is not None:
            return f"{self.act} is linear nowhere; act=relu is above the noise"
        if self.noise is None and self.act != "identity":
            return "without noise there are no masks to lift the image above the kink"
        if site is not None and not site.geometry.pointwise:
            return "only a 1x1 convolution can be kept; others by fit (with data), project or random"
        return None

    def start_for(self, wanted: Start | None, site: Site | None = None, *, data: bool = False) -> Start:
        found = super().start_for(wanted, site, data=data)
        if found.name == "neutral" and found.value is not None:
            raise ArgumentError("start", f"{self.name} starts by neutral without an eps: it is exact")
        return found

    def cost(self, site: Site) -> Cost:
        geometry, fanout = site.geometry, self._fanout(site.geometry)
        mixed = geometry.out_channels * (geometry.in_channels // geometry.groups) * fanout
        params = mixed + geometry.out_channels * geometry.bias
        window = Grid.of(geometry).window
        if self.trainable and site.output_shape is not None and self.noise is not None:
            height, width = Grid.of(geometry).size((site.output_shape[-2], site.output_shape[-1]))
            params += (1 if self.shared else geometry.in_channels) * fanout * height * width
        return Cost(params, mixed * site.positions * window[0] * window[1])

    def build(self, conv: nn.Conv2d, start: Start, *, absorb: bool, site: Site | None = None) -> Built:
        if site is None or site.output_shape is None:
            raise ConversionError("pnn needs the size of the images: build it for a site")
        pointwise = pair(conv.kernel_size) == (1, 1)
        keeps = start.name == "neutral" or (
            start.name == "fit" and pointwise and self.refuses_start("neutral", site) is None
        )
        fanout = self._fanout(ConvGeometry.of(conv))
        reach = [d * (k - 1) + 1 for k, d in zip(pair(conv.kernel_size), pair(conv.dilation), strict=True)]
        layer = Perturbation2d(
            **conv_options(conv),
            # Only the options count here; the masks are drawn below, at the size the site has.
            image_size=(reach[0], reach[1]),
            fanout=fanout,
            level=self.level,
            noise=self.noise or "none",
            seed=self.seed,
            act=self.act,
            shared=self.shared,
            pool=self.pool,
            resize=self.masks != "fixed",
            centered=keeps,
            stream=site.name,
            device="meta",
        )
        trains = conv.weight.requires_grad
        layer.weight = nn.Parameter(
            torch.empty(layer.weight.shape, device=conv.weight.device, dtype=conv.weight.dtype), requires_grad=trains
        )
        layer.set_masks(layer.grid.size((site.output_shape[-2], site.output_shape[-1])), self.trainable)
        with torch.no_grad():
            if start.name == "random":
                layer.bias = None if conv.bias is None else nn.Parameter(torch.empty_like(conv.bias))
                layer.reset_parameters(torch.Generator().manual_seed(int(start.value or 0)))
                if layer.bias is not None and conv.bias is not None:
                    layer.bias.requires_grad_(conv.bias.requires_grad)
            else:
                layer.bias = conv.bias
            if keeps and not conv.weight.is_meta:
                # All of it on the first mask: the sum over the others is 0 exactly.
                layer.weight.zero_()[:, ::fanout] = conv.weight
                if layer.masks is not None:
                    layer.masks += _FAR
            elif start.name != "random" and not conv.weight.is_meta:
                layer.weight.copy_(projected(conv.weight, fanout))
        return Built(layer.train(conv.training))
