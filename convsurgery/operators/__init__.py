"""What can take a convolution's place. Importing this package registers all operators of the project."""

from convsurgery.operators import conv, kervolution
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
from convsurgery.operators.conv import Conv
from convsurgery.operators.kervolution import KervGauss, KervL1, KervL2, KervLinear, KervPoly, KervSigmoid

__all__ = [
    "Built",
    "Conv",
    "KervGauss",
    "KervL1",
    "KervL2",
    "KervLinear",
    "KervPoly",
    "KervSigmoid",
    "OperatorConfig",
    "Start",
    "bind",
    "conv",
    "kervolution",
    "list_operators",
    "operator",
    "option",
    "register_operator",
]
