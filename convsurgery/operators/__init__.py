"""What can take a convolution's place. Importing this package registers all operators of the project."""

from convsurgery.operators import block, conv, fused, kervolution
from convsurgery.operators.base import (
    Built,
    OperatorConfig,
    Start,
    bind,
    list_operators,
    operator,
    option,
    register_operator,
)
from convsurgery.operators.block import Block
from convsurgery.operators.conv import Conv
from convsurgery.operators.fused import Fused
from convsurgery.operators.kervolution import KervGauss, KervL1, KervL2, KervLinear, KervPoly, KervSigmoid

__all__ = [
    "Block",
    "Built",
    "Conv",
    "Fused",
    "KervGauss",
    "KervL1",
    "KervL2",
    "KervLinear",
    "KervPoly",
    "KervSigmoid",
    "OperatorConfig",
    "Start",
    "bind",
    "block",
    "conv",
    "fused",
    "kervolution",
    "list_operators",
    "operator",
    "option",
    "register_operator",
]
