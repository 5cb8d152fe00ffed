"""What can take a convolution's place. Importing this package registers all operators of the project."""

from convsurgery.operators import block, conv, diffusion, fused, kervolution, lbc, linear_mix, perturbation
from convsurgery.operators.base import (
    Built,
    Fitter,
    OperatorConfig,
    Start,
    bind,
    list_operators,
    operator,
    option,
    register_operator,
)
from convsurgery.operators.blend import Blend
from convsurgery.operators.block import Block
from convsurgery.operators.conv import Conv
from convsurgery.operators.diffusion import RDCirculant, RDExplicit, RDImplicit
from convsurgery.operators.fused import Fused
from convsurgery.operators.kervolution import KervGauss, KervL1, KervL2, KervLinear, KervPoly, KervSigmoid
from convsurgery.operators.layer import OperatorLayer
from convsurgery.operators.lbc import Lbc
from convsurgery.operators.linear_mix import LinearMix
from convsurgery.operators.perturbation import Pnn

__all__ = [
    "Blend",
    "Block",
    "Built",
    "Conv",
    "Fitter",
    "Fused",
    "KervGauss",
    "KervL1",
    "KervL2",
    "KervLinear",
    "KervPoly",
    "KervSigmoid",
    "Lbc",
    "LinearMix",
    "OperatorConfig",
    "OperatorLayer",
    "Pnn",
    "RDCirculant",
    "RDExplicit",
    "RDImplicit",
    "Start",
    "bind",
    "block",
    "conv",
    "diffusion",
    "fused",
    "kervolution",
    "lbc",
    "linear_mix",
    "list_operators",
    "operator",
    "option",
    "perturbation",
    "register_operator",
]
