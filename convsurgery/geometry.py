"""The shape arithmetic of a convolution and the description of one site; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Block", "ConvGeometry", "Cost", "OtherConv", "Pair", "Site", "pad_amounts", "pair"]

Pair = tuple[int, int]


def pair(value: int | tuple[int, ...]) -> Pair:
    """``3`` as ``(3, 3)``; a pair as itself."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def pad_amounts(padding: str | int | tuple[int, ...], kernel: Pair, dilation: Pair) -> tuple[int, int, int, int]:
    """Padding as ``(left, right, top, bottom)``; "same" puts the odd pixel right and below, as torch does.

    Raises:
        ValueError: for a word other than "same" and "valid".
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        height, width = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return width // 2, width - width // 2, height // 2, height - height // 2
    if isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or numbers, not {padding!r}")
    top, left = pair(padding)
    return left, left, top, top


@dataclass(frozen=True)
class ConvGeometry:
    """What a Conv2d is, apart from its weights.

    ``padding`` is ``(left, right, top, bottom)`` in pixels, the order of ``torch.nn.functional.pad``, so that "same"
    with an even kernel has a place.

    A ``padding_mode`` of "same" is no mode of torch's: zeros are added when the input's size is known, as many as give
    ceil(size / stride) output pixels (TensorFlow's SAME), the odd one right and below. ``padding`` is then all zeros.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, conv: Any) -> ConvGeometry:
        """The geometry of anything with the attributes of ``torch.nn.Conv2d``."""
        return cls(
            conv.in_channels,
            conv.out_channels,
            pair(conv.kernel_size),
            pair(conv.stride),
            pad_amounts(conv.padding, pair(conv.kernel_size), pair(conv.dilation)),
            pair(conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
        )

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def pointwise(self) -> bool:
        return self.kernel_size == (1, 1)

    @property
    def patch(self) -> int:
        """Values under the window: C_in / groups * kh * kw."""
        return self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    def output_size(self, height: int, width: int) -> Pair:
        """Output height and width in pixels for an input of the given height and width."""
        if self.padding_mode == "same":
            return -(-height // self.stride[0]), -(-width // self.stride[1])
        left, right, top, bottom = self.padding
        padded = (height + top + bottom, width + left + right)
        out = [
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        return out[0], out[1]

    def __str__(self) -> str:
        def short(value: Pair) -> str:
            return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"

        text = f"{self.in_channels}→{self.out_channels} {self.kernel_size[0]}x{self.kernel_size[1]}"
        if self.stride != (1, 1):
            text += f" s{short(self.stride)}"
        if self.dilation != (1, 1):
            text += f" d{short(self.dilation)}"
        if self.depthwise and self.out_channels == self.in_channels:
            text += " dw"
        elif self.groups != 1:
            text += f" g{self.groups}"
        return text


@dataclass(frozen=True)
class Cost:
    """Trainable parameters, and multiply-accumulates for one image."""

    params: int
    macs: int


@dataclass(frozen=True)
class Site:
    """One Conv2d of a model at the place and moment it is called.

    Attributes:
        names: every dotted name the module is reachable by, first the one ``named_modules`` gives; "" is the root.
        index: position in execution order; -1 when no forward call reaches it.
        geometry: the convolution's options.
        input_shape, output_shape: of the first call, batch included; None when never called.
        calls: how often one forward pass calls it.
        positions: output pixels for each image, over all calls; regions of an image count each.
        owners: class names of the modules around it, the innermost first.
        kind: the module's class name.
        dtype: of the weight, as torch names it ("float32").
        batchnorm: name of the BatchNorm2d that alone consumes this convolution's output, if any.
        blocked: why the module cannot be replaced whatever the operator, or None.
        tied: names of other modules that hold a parameter of it too.
        first: whether the model itself declares it a first convolution (timm's ``pretrained_cfg["first_conv"]``).
    """

    names: tuple[str, ...]
    index: int
    geometry: ConvGeometry
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    calls: int = 1
    owners: tuple[str, ...] = ()
    kind: str = "Conv2d"
    dtype: str = "float32"
    batchnorm: str | None = None
    blocked: str | None = None
    first: bool = False
    positions: int = 0
    tied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def label(self) -> str:
        """The name as printed: the root module has an empty one."""
        return self.names[0] or "(the model itself)"

    @property
    def cost(self) -> Cost:
        """What the convolution itself costs."""
        geometry = self.geometry
        params = geometry.out_channels * (geometry.patch + geometry.bias)
        return Cost(params, geometry.out_channels * geometry.patch * self.positions)


@dataclass(frozen=True)
class OtherConv:
    """Convolutions that a forward pass executes and that are no site.

    Attributes:
        kind: "functional" (a call of ``F.conv2d`` and the like), "unregistered" (a Conv2d that is no part of the
            model), "inside" (more than one in one call of a listed module), or what they are instead of
            two-dimensional: "1-d", "3-d", "transposed 2-d", "deformable", …; "2-d" for those inside TorchScript.
        owner: class name of the module whose forward executes them; "NoneType" outside of any.
        names: of those modules, in execution order; of an unregistered one there is none.
        calls: how many one forward pass executes.
    """

    kind: str
    owner: str
    names: tuple[str, ...]
    calls: int

    def __str__(self) -> str:
        shown = ", ".join(name or "the model itself" for name in self.names[:2])
        where = f" ({shown}{f' and {len(self.names) - 2} more' if len(self.names) > 2 else ''})" if self.names else ""
        owner = "no module" if self.owner == "NoneType" else self.owner
        one = self.calls == 1
        many = f"{self.calls} convolution{'' if one else 's'}"
        if self.kind == "functional":
            return f"{many} in {owner}{where} {'is' if one else 'are'} functional, not {'a ' * one}Conv2d"
        if self.kind == "unregistered":
            return f"{many} {'runs' if one else 'run'} in a Conv2d that is no part of the model: nothing registers it"
        if self.kind == "inside":
            return f"{many} more {'runs' if one else 'run'} inside {shown}"
        return f"{many} in {owner}{where} {'is' if one else 'are'} {self.kind}"


@dataclass(frozen=True)
class Block:
    """Several layers that a structural pattern matched: a cut of the model with one input and one output.

    Attributes:
        pattern: the pattern's name.
        owner: name of the smallest module whose forward runs all of it; "" is the model.
        sites: names of its convolutions, in execution order.
        members: names of the modules it is made of, in execution order.
        kinds: their classes' names.
        own: those of the members that nothing else uses.
        chain: whether it is nothing but these modules one after the other, each used here alone. They can then be
            exchanged one by one; otherwise the owner's forward has to be rewritten.
        nodes: names of the nodes in the graph of the owner's forward; empty for a chain.
        opened: names of the modules below the owner that its graph shows from the inside.
        input_shape: of its first convolution's input, batch included.
        output_shape: of its last convolution's output, batch included.
        projected: for a residual block, whether a convolution stands in the shortcut.
        params: parameters of all members.
        macs: multiply-accumulates of its convolutions for one image.
    """

    pattern: str
    owner: str
    sites: tuple[str, ...]
    members: tuple[str, ...]
    kinds: tuple[str, ...]
    own: tuple[str, ...]
    chain: bool
    nodes: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    projected: bool = False
    params: int = 0
    macs: int = 0

    @property
    def label(self) -> str:
        """Where it is, as printed: its first and last module."""
        ends = dict.fromkeys((self.members[0], self.members[-1]))
        return " … ".join(ends)
