"""The functional forms of all operators, in the manner of ``torch.nn.functional``."""

from convsurgery.operators.diffusion import reaction_diffusion
from convsurgery.operators.kervolution import kerv_gauss, kerv_l1, kerv_l2, kerv_linear, kerv_poly, kerv_sigmoid
from convsurgery.operators.lbc import local_binary_conv
from convsurgery.operators.linear_mix import linear_mix
from convsurgery.operators.perturbation import perturbation

__all__ = [
    "kerv_gauss",
    "kerv_l1",
    "kerv_l2",
    "kerv_linear",
    "kerv_poly",
    "kerv_sigmoid",
    "linear_mix",
    "local_binary_conv",
    "perturbation",
    "reaction_diffusion",
]
