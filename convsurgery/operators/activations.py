"""timm's activations without parameters: as torch functions, and as ONNX text for function bodies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "activation"]


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        function: pointwise, not in place.
        onnx: ONNX statements that compute ``a`` from ``z``; every attribute is written, as older runtimes trip over
            defaults inside functions.
    """

    function: Callable[[Tensor], Tensor]
    onnx: tuple[str, ...]


def _number(name: str, value: float) -> str:
    return f"{name} = Constant <value_float = {value!r}> ()"


def _gate(slope: float) -> tuple[str, ...]:
    """z · sigmoid(slope · z)."""
    if slope == 1:
        return ("gate = Sigmoid (z)", "a = Mul (z, gate)")
    return (_number("slope", slope), "steep = Mul (z, slope)", "gate = Sigmoid (steep)", "a = Mul (z, gate)")


def _halves(*lines: str) -> tuple[str, ...]:
    """z/2 · (1 + inner), where the lines compute ``inner``."""
    return (
        *lines,
        _number("unit", 1.0),
        _number("half", 0.5),
        "upper = Add (inner, unit)",
        "scaled = Mul (z, half)",
        "a = Mul (scaled, upper)",
    )


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, ("a = Relu (z)",)),
    "relu6": Activation(F.relu6, (_number("lowest", 0.0), _number("highest", 6.0), "a = Clip (z, lowest, highest)")),
    "leaky_relu": Activation(F.leaky_relu, ("a = LeakyRelu <alpha = 0.01> (z)",)),
    "elu": Activation(F.elu, ("a = Elu <alpha = 1.0> (z)",)),
    "celu": Activation(F.celu, ("a = Celu <alpha = 1.0> (z)",)),
    "selu": Activation(
        F.selu, ("a = Selu <alpha = 1.67326319217681884765625, gamma = 1.05070102214813232421875> (z)",)
    ),
    "gelu": Activation(
        F.gelu,
        _halves(_number("root", math.sqrt(0.5)), "scaled_z = Mul (z, root)", "inner = Erf (scaled_z)"),
    ),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"),
        _halves(
            _number("cubic", 0.044715),
            _number("factor", math.sqrt(2 / math.pi)),
            "zz = Mul (z, z)",
            "zzz = Mul (zz, z)",
            "third = Mul (zzz, cubic)",
            "sum = Add (z, third)",
            "argument = Mul (sum, factor)",
            "inner = Tanh (argument)",
        ),
    ),
    "quick_gelu": Activation(lambda z: z * F.sigmoid(z * 1.702), _gate(1.702)),
    "silu": Activation(F.silu, _gate(1)),
    "mish": Activation(F.mish, ("soft = Softplus (z)", "squashed = Tanh (soft)", "a = Mul (z, squashed)")),
    "sigmoid": Activation(F.sigmoid, ("a = Sigmoid (z)",)),
    "tanh": Activation(F.tanh, ("a = Tanh (z)",)),
    "hard_sigmoid": Activation(
        F.hardsigmoid, ("a = HardSigmoid <alpha = 0.16666667163372039794921875, beta = 0.5> (z)",)
    ),
    "hard_swish": Activation(
        F.hardswish,
        ("gate = HardSigmoid <alpha = 0.16666667163372039794921875, beta = 0.5> (z)", "a = Mul (z, gate)"),
    ),
    "hard_mish": Activation(
        lambda z: 0.5 * z * (z + 2).clamp(0, 2),
        (
            _number("two", 2.0),
            _number("zero", 0.0),
            _number("half", 0.5),
            "raised = Add (z, two)",
            "clipped = Clip (raised, zero, two)",
            "scaled = Mul (z, half)",
            "a = Mul (scaled, clipped)",
        ),
    ),
    "identity": Activation(lambda z: z, ("a = Identity (z)",)),
}
ACTIVATIONS["swish"] = ACTIVATIONS["silu"]
ACTIVATIONS["hardswish"] = ACTIVATIONS["hard_swish"]
ACTIVATIONS["hardsigmoid"] = ACTIVATIONS["hard_sigmoid"]


def activation(z: Tensor, name: str, *, inplace: bool) -> Tensor:
    """The activation ``name`` of ``z``; ``inplace`` allows overwriting z."""
    if inplace and name == "relu":
        return z.relu_()
    return ACTIVATIONS[name].function(z)
