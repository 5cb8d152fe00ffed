"""The functional forms of all operators, in the manner of ``torch.nn.functional``.

Importing this module registers every torch op of the project. That is what a process needs that loads a ``.pt2`` or
TorchScript file of a converted model: ``import convsurgery.functional``, or ``import convsurgery`` behind ``import
torch``.
"""

from convsurgery.operators.diffusion import reaction_diffusion
from convsurgery.operators.kervolution import (
    kerv_gauss,
    kerv_gauss_dial,
    kerv_l1,
    kerv_l2,
    kerv_l2_dial,
    kerv_linear,
    kerv_poly,
    kerv_poly_dial,
    kerv_sigmoid,
    kerv_sigmoid_dial,
)
from convsurgery.operators.lbc import local_binary_conv
from convsurgery.operators.linear_mix import linear_mix
from convsurgery.operators.perturbation import perturbation

__all__ = [
    "kerv_gauss",
    "kerv_gauss_dial",
    "kerv_l1",
    "kerv_l2",
    "kerv_l2_dial",
    "kerv_linear",
    "kerv_poly",
    "kerv_poly_dial",
    "kerv_sigmoid",
    "kerv_sigmoid_dial",
    "linear_mix",
    "local_binary_conv",
    "perturbation",
    "reaction_diffusion",
]
