"""One row per registered operator and per variant worth its own: what the generic tests know about it.

Every tolerance is stated here and bounds :func:`naive.error`: the largest difference relative to the largest value. A
registered operator without a row fails the collection of ``test_operators.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import naive
import torch
from torch import Tensor, nn

from convsurgery.geometry import ConvGeometry, Site
from convsurgery.operators import Built, OperatorConfig, Start, bind, list_operators, operator
from convsurgery.operators.kervolution import Dialled
from convsurgery.rules import parse_target


@dataclass(frozen=True)
class Neutral:
    """The dialled form, which is the convolution for ε = 0.

    Attributes:
        dial: what it has to compute, from the paper's definition.
        order: of its distance from the convolution in ε.
        eps: powers of two, large to small, over which the distance must fall so.
    """

    dial: naive.Dial
    order: int
    eps: tuple[float, ...] = (2.0**-6, 2.0**-9, 2.0**-12)


@dataclass(frozen=True)
class Row:
    """An operator as a rule names it.

    Attributes:
        rule: the target.
        kernel: naive formula of window and filter; None for the null operator, which is an ``nn.Conv2d``.
        op: of ``torch.ops.convsurgery``.
        op_type: of the ONNX node.
        hyper: the hyperparameter's value after a ``copy`` start, from the number of values under the window.
        float64, float32: bounds on the error of the plain, centred and dialled forms.
        bfloat16, float16: bounds on the error under autocast, all forms.
        onnx: bound on the error of ONNX Runtime.
        neutral: None where there is no such start.
        twice: whether a second derivative exists.
    """

    rule: str
    kernel: naive.Kernel | None
    op: str = ""
    op_type: str = ""
    hyper: Callable[[int], float] | None = None
    float64: float = 0.0
    float32: float = 0.0
    bfloat16: float = 0.0
    float16: float = 0.0
    onnx: float = 0.0
    neutral: Neutral | None = None
    twice: bool = True

    @property
    def config(self) -> OperatorConfig:
        return bind(parse_target(self.rule))

    @property
    def learnable(self) -> bool | str:
        return getattr(self.config, "learnable", False)

    def layer(self, conv: nn.Conv2d, start: str = "copy", *, absorb: bool = False) -> nn.Module:
        """The module that takes ``conv``'s place."""
        config = self.config
        return config.build(conv, config.start_for(Start.parse(start)), absorb=absorb).module

    def scaled(self, conv: nn.Conv2d, eps: float | None = None, *, absorb: bool = False) -> Built:
        """What the neutral start of convsurgery 0.1 put there, which saved models still hold."""
        return self.config.build(conv, Start("neutral", eps, scaled=True), absorb=absorb)

    def dialled(self, conv: nn.Conv2d) -> nn.Module:
        """The dialled form with all constants given, different in every channel, ε exactly 0 in the first."""
        layer = self.layer(conv, "neutral")
        channels = conv.out_channels
        layer.eps = layer.constant(torch.linspace(0, 0.6, channels))
        layer.gain = layer.constant(torch.linspace(1.5, -0.5, channels))
        layer.offset = layer.constant(torch.linspace(0.3, 0.6, channels))
        if self.learnable:
            log = getattr(layer, layer.log_name)
            log.data += torch.linspace(-0.3, 0.2, channels) if log.dim() else 0.2
        return layer

    def full(self, conv: nn.Conv2d, *, centered: bool) -> nn.Module:
        """As :meth:`layer`, with all constants given, different in every channel."""
        layer = self.layer(conv)
        channels = conv.out_channels
        layer.centered = centered
        layer.scale = layer.constant(torch.linspace(-1.2, 0.7, channels))
        layer.gain = layer.constant(torch.linspace(1.5, -0.5, channels))
        layer.offset = layer.constant(torch.linspace(0.3, 0.6, channels))
        if self.learnable == "channel":
            log = getattr(layer, f"log_{layer.hyper_name}")
            log.data += torch.linspace(-0.5, 0.5, channels)
        return layer

    def naive(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What ``layer`` has to compute, in float64."""
        assert self.kernel is not None
        if isinstance(layer, Dialled):
            assert self.neutral is not None
            return naive.dialled(self.neutral.dial, layer, x)
        return naive.kervolve(self.kernel, layer, x, layer.hyper() if layer.hyper_name else None)

    def __str__(self) -> str:
        return self.rule


def _poly(rule: str, degree: int, balance: float, bfloat16: float, float16: float) -> Row:
    return Row(
        rule,
        naive.poly(degree),
        "kerv_poly",
        "PolyKervolution2d",
        lambda patch: balance,
        float64=1e-14,
        float32=2e-6,
        bfloat16=bfloat16,
        float16=float16,
        onnx=2e-6,
        # Of degree 1 the polynomial is affine: neutral at any ε.
        neutral=Neutral(naive.dial_poly(degree), int(degree > 1)) if balance else None,
    )


def _gauss(rule: str, gamma: float | None) -> Row:
    return Row(
        rule,
        naive.gauss,
        "kerv_gauss",
        "GaussKervolution2d",
        lambda patch: gamma or 1 / patch,
        float64=5e-15,
        float32=1e-6,
        bfloat16=0.012,
        float16=1.5e-3,
        onnx=2e-6,
        neutral=None if gamma else Neutral(naive.dial_gauss, 1),
    )


TABLE = (
    Row("conv", None),
    Row(
        "kerv-linear",
        naive.linear,
        "kerv_linear",
        "LinearKervolution2d",
        float64=5e-15,
        float32=1e-6,
        bfloat16=0.01,
        float16=1.3e-3,
        onnx=1e-6,
    ),
    _poly("kerv-poly(degree=1)", 1, 1.0, 0.01, 1.3e-3),
    _poly("kerv-poly(degree=2)", 2, 1.0, 0.015, 2e-3),
    _poly("kerv-poly", 3, 1.0, 0.02, 3e-3),
    _poly("kerv-poly(degree=5, balance=0.5)", 5, 0.5, 0.03, 5e-3),
    _poly("kerv-poly(degree=2, balance=0)", 2, 0.0, 0.02, 3e-3),
    _poly("kerv-poly(learnable=true)", 3, 1.0, 0.02, 3e-3),
    _poly("kerv-poly(degree=4, balance=2.0, learnable=channel)", 4, 2.0, 0.025, 3e-3),
    _gauss("kerv-gauss", None),
    _gauss("kerv-gauss(gamma=0.1)", 0.1),
    _gauss("kerv-gauss(learnable=true)", None),
    _gauss("kerv-gauss(gamma=0.05, learnable=channel)", 0.05),
    Row(
        "kerv-sigmoid",
        naive.sigmoid,
        "kerv_sigmoid",
        "SigmoidKervolution2d",
        float64=5e-15,
        float32=1e-6,
        bfloat16=0.01,
        float16=1.3e-3,
        onnx=2e-6,
        neutral=Neutral(naive.dial_sigmoid, 2, (2.0**-3, 2.0**-5, 2.0**-7)),
    ),
    Row(
        "kerv-l1",
        naive.l1,
        "kerv_l1",
        "L1Kervolution2d",
        float64=5e-15,
        float32=1e-6,
        bfloat16=0.01,
        float16=1.3e-3,
        onnx=2e-6,
        # ∂²/∂x∂w of |x − w| is 0 almost everywhere, and its backward has no derivative of its own.
        twice=False,
    ),
    Row(
        "kerv-l2",
        naive.l2,
        "kerv_l2",
        "L2Kervolution2d",
        float64=5e-15,
        float32=1e-6,
        bfloat16=0.01,
        float16=1.3e-3,
        onnx=2e-6,
        neutral=Neutral(naive.dial_l2, 1),
    ),
)


@dataclass(frozen=True)
class MixRow:
    """An operator whose learned part is a 1x1 mix, of features of the image or beside something else.

    Attributes:
        rule: the target.
        naive: what a layer of it has to compute, in float64.
        op, op_type: of ``torch.ops.convsurgery``, and of the ONNX node.
        float64, float32, bfloat16, float16, onnx: bounds on the error.
        default: name of the start at a 3x3 convolution where there is no data.
    """

    rule: str
    naive: Callable[[nn.Module, Tensor], Tensor]
    op: str
    op_type: str
    float64: float = 5e-15
    float32: float = 1e-6
    bfloat16: float = 0.03
    float16: float = 4e-3
    onnx: float = 2e-6
    default: str = "project"

    @property
    def config(self) -> OperatorConfig:
        return bind(parse_target(self.rule))

    def build(self, conv: nn.Conv2d, size: tuple[int, int], start: str | None = None) -> Built:
        """What takes ``conv``'s place where images have ``size``."""
        geometry, config = ConvGeometry.of(conv), self.config
        shapes = (2, conv.in_channels, *size), (2, conv.out_channels, *geometry.output_size(*size))
        site = Site(("conv",), 0, geometry, *shapes, positions=shapes[1][2] * shapes[1][3])
        assert config.refuses(site) is None
        begin = config.start_for(None if start is None else Start.parse(start), site)
        return config.build(conv, begin, absorb=False, site=site)

    def layer(self, conv: nn.Conv2d, size: tuple[int, int], start: str | None = None) -> nn.Module:
        return self.build(conv, size, start).module

    def __str__(self) -> str:
        return self.rule


def _pnn(rule: str, **bounds: Any) -> MixRow:
    return MixRow(rule, naive.perturb, "perturbation2d", "Perturbation2d", **bounds)


def _lbc(rule: str, **bounds: Any) -> MixRow:
    return MixRow(rule, naive.local_binary, "local_binary_conv2d", "LocalBinaryConv2d", **bounds)


def _linear_mix(rule: str) -> MixRow:
    return MixRow(rule, naive.linear_mixed, "linear_mix2d", "LinearMix2d")


MIXES = (
    _linear_mix("linear-mix(extend=true)"),
    _pnn("pnn"),
    _pnn("pnn(fanout=3, level=0.5)"),
    _pnn("pnn(masks=8, noise=gaussian, shared=true, pool=avg)"),
    _pnn("pnn(act=silu, seed=3, masks=fixed)"),
    _pnn("pnn(fanout=2, act=gelu, trainable=true, pool=avg)"),
    _pnn("pnn(noise=none)"),
    _lbc("lbc"),
    _lbc("lbc(filters=24, sparsity=0.9, seed=2)"),
    _lbc("lbc(filters=12, sparsity=0, act=tanh)", default="random"),
)


@dataclass(frozen=True)
class StepRow:
    """A step of a differential equation in the place of a residual block.

    Attributes:
        rule: the target.
        form, boundary: of the op behind it.
        float64, float32, bfloat16, float16: bounds on the error.
    """

    rule: str
    form: str
    boundary: str = "periodic"
    float64: float = 1e-13
    float32: float = 1e-5
    bfloat16: float = 0.02
    float16: float = 3e-3

    @property
    def config(self) -> OperatorConfig:
        return bind(parse_target(self.rule))

    def __str__(self) -> str:
        return self.rule


STEPS = (
    StepRow("rd-explicit", "explicit"),
    StepRow("rd-explicit(boundary=zeros)", "explicit", "zeros"),
    StepRow("rd-implicit", "implicit"),
    StepRow("rd-circulant", "circulant"),
)

#: all but the null operator
KERVOLUTIONS = tuple(row for row in TABLE if row.kernel is not None)
NEUTRAL = tuple(row for row in TABLE if row.neutral is not None)
LEARNABLE = tuple(row for row in TABLE if row.learnable)


def operators_without_row(names: Iterable[str]) -> list[str]:
    """Those of our own operators for convolutions that no row tests; a user's own are no concern of this table.

    Operators that only move or fold what is there have a table of their own in ``test_rewriting.py``.
    """
    ours = {n for n in names if operator(n).__module__.startswith("convsurgery.")} - {"block", "fused"}
    return sorted(ours - {row.config.name for row in (*TABLE, *MIXES, *STEPS)})


if untested := operators_without_row(list_operators()):
    raise LookupError(f"operators without a row in {__file__}: {', '.join(untested)}")
