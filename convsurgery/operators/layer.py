"""What the engine asks of every layer that took a convolution's place."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from typing_extensions import Self

from convsurgery.errors import ExportError
from convsurgery.folding import refuse_folding
from convsurgery.geometry import ConvGeometry, Pair, pair
from convsurgery.operators.base import Fitter

__all__ = ["OperatorLayer", "conv_options"]


class OperatorLayer(nn.Module):
    """Base of the layers that operators build; gives ``fuse``, export and calibration something to call."""

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: Pair
    stride: Pair
    dilation: Pair
    padding: str | Pair
    padding_mode: str
    #: as :class:`torch.nn.Conv2d` has them; tools that prune or count ask for both
    transposed = False
    output_padding: Pair = (0, 0)

    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "geometry"]

    @property
    def weight(self) -> Tensor:
        """The filters, a Parameter. Code that would fold something into them as into a convolution's is refused."""
        own = self.__dict__
        # What old-style weight norm or pruning computes stands in the dictionary.
        found: Any = own["weight"] if "weight" in own else super().__getattr__("weight")
        refuse_folding(type(self).__name__)
        return cast(Tensor, found)

    @weight.setter
    def weight(self, value: Any) -> None:
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        try:
            del self.__dict__["weight"]
        except KeyError:
            raise AttributeError("weight") from None

    @property
    def geometry(self) -> ConvGeometry:
        """The geometry of the convolution; its channels are what they are now, also when somebody has pruned them."""
        made = self._geometry
        if (made.in_channels, made.out_channels, made.groups) != (self.in_channels, self.out_channels, self.groups):
            made = dataclasses.replace(
                made, in_channels=self.in_channels, out_channels=self.out_channels, groups=self.groups
            )
        return made

    def __prepare_scriptable__(self) -> nn.Module:
        raise ExportError(
            f"TorchScript's compiler cannot read a {type(self).__name__}: record it by torch.jit.trace(model, inputs), "
            "or take torch.export.export or convsurgery.export_onnx"
        )

    def take_options(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair,
        padding: str | int | Pair,
        dilation: int | Pair,
        groups: int,
        bias: bool,
        padding_mode: str,
    ) -> tuple[int, ...]:
        """Set the attributes of a convolution with these options, checked as :class:`torch.nn.Conv2d` checks them.

        Returns:
            The shape its filters would have.
        """
        # A meta Conv2d gives torch's own messages and allocates nothing.
        template = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = pair(kernel_size), pair(stride), pair(dilation)
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.padding_mode = padding_mode
        self._geometry = ConvGeometry.of(template)
        return tuple(template.weight.shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Refuse a convolution's weights where this layer's of that name are something else."""
        own = {**self._parameters, **self._buffers}
        mine = [key for key, value in own.items() if value is not None and key not in ("weight", "bias")]
        mine = [key for key in mine if key not in self._non_persistent_buffers_set]
        absent = mine and not any(prefix + key in state_dict for key in mine)
        if absent and prefix + "weight" in state_dict and not self.takes_filters():
            args[-1].append(
                f"{prefix.rstrip('.') or 'the layer'} is a {type(self).__name__}, and these look like the weights of "
                f"the model before its conversion: there is no {mine[0]}, and what is called weight is another thing. "
                "Load them into the original model and convert it then"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def takes_filters(self) -> bool:
        """Whether the filters of a convolution mean the same as this layer's ``weight``, the rest being as it is."""
        return False

    def fold(self) -> Self:
        """A copy for deployment: constants folded, nothing learnable, the same function up to rounding."""
        raise NotImplementedError

    def fuse(self) -> nn.Module:
        """What timm's ``reparameterize_model`` puts in this layer's place: :meth:`fold`, or something simpler."""
        return self.fold()

    def complete(self) -> None:
        """Before export, on a folded layer: give it every constant that its node can have, the function staying."""

    def absorb_affine(self, gain: Tensor, bias: Tensor) -> bool:
        """Follow this layer by ``gain · y + bias`` (both (C_out,)), folded into its weights.

        Returns:
            False where the layer cannot; it is then as before. Must not depend on values, but on the layer's kind.
        """
        return False

    def leave_gain(self) -> Tensor | None:
        """Give up a positive output gain that costs a pass: y becomes y / gain; returns it, (C_out,).

        None, and nothing is changed, where there is none to leave. Must not depend on values, but for their signs.
        """
        return None

    def prepared(self, input: Tensor) -> Tensor:
        """What this layer works on where a convolution that pads its own input stood; else the input itself."""
        return input

    def fitter(self, conv: nn.Conv2d, ridge: float | None = None, *, shift: bool = False) -> Fitter | None:
        """What fits this layer to the outputs of ``conv``; None for a layer without a closed form.

        Args:
            conv: the convolution it replaced, in the original model.
            ridge: strength of the penalty on the weights, relative to the mean power of the features; None for the
                layer's own.
            shift: whether a BatchNorm behind can take what a layer without a bias cannot hold: the fitter's ``shift``,
                (C_out,), is then to be added to the layer's output.
        """
        return None


def conv_options(conv: Any) -> dict[str, Any]:
    """The options of a Conv2d, or of a layer in the place of one, as arguments for another."""
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": pair(conv.kernel_size),
        "stride": pair(conv.stride),
        "padding": conv.padding,
        "dilation": pair(conv.dilation),
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
    }
