"""Kervolution: a kernel function of window and filter in place of their inner product.

Wang, Yang, Xie, Yuan: *Kervolutional Neural Networks*, CVPR 2019. One file for each kernel.
"""

from convsurgery.operators.kervolution._fitting import AffineFit, NeutralFit, ScaleFit
from convsurgery.operators.kervolution._layer import Kervolution2d
from convsurgery.operators.kervolution.gauss import GaussKervolution2d, KervGauss, kerv_gauss
from convsurgery.operators.kervolution.l1 import KervL1, L1Kervolution2d, kerv_l1
from convsurgery.operators.kervolution.l2 import KervL2, L2Kervolution2d, kerv_l2
from convsurgery.operators.kervolution.linear import KervLinear, LinearKervolution2d, kerv_linear
from convsurgery.operators.kervolution.poly import KervPoly, PolyKervolution2d, kerv_poly
from convsurgery.operators.kervolution.sigmoid import KervSigmoid, SigmoidKervolution2d, kerv_sigmoid

__all__ = [
    "AffineFit",
    "GaussKervolution2d",
    "KervGauss",
    "KervL1",
    "KervL2",
    "KervLinear",
    "KervPoly",
    "KervSigmoid",
    "Kervolution2d",
    "L1Kervolution2d",
    "L2Kervolution2d",
    "LinearKervolution2d",
    "NeutralFit",
    "PolyKervolution2d",
    "ScaleFit",
    "SigmoidKervolution2d",
    "kerv_gauss",
    "kerv_l1",
    "kerv_l2",
    "kerv_linear",
    "kerv_poly",
    "kerv_sigmoid",
]
