"""Kervolution: a kernel function of window and filter in place of their inner product.

Wang, Yang, Xie, Yuan: *Kervolutional Neural Networks*, CVPR 2019. One file for each kernel: in the paper's form, and
dialled from the convolution.
"""

from convsurgery.operators.kervolution._dialled import Dialled
from convsurgery.operators.kervolution._fitting import AffineFit, DialFit, NeutralFit, ScaleFit
from convsurgery.operators.kervolution._layer import Kervolution2d
from convsurgery.operators.kervolution.gauss import (
    GaussDial2d,
    GaussKervolution2d,
    KervGauss,
    kerv_gauss,
    kerv_gauss_dial,
)
from convsurgery.operators.kervolution.l1 import KervL1, L1Kervolution2d, kerv_l1
from convsurgery.operators.kervolution.l2 import KervL2, L2Dial2d, L2Kervolution2d, kerv_l2, kerv_l2_dial
from convsurgery.operators.kervolution.linear import KervLinear, LinearKervolution2d, kerv_linear
from convsurgery.operators.kervolution.poly import KervPoly, PolyDial2d, PolyKervolution2d, kerv_poly, kerv_poly_dial
from convsurgery.operators.kervolution.sigmoid import (
    KervSigmoid,
    SigmoidDial2d,
    SigmoidKervolution2d,
    kerv_sigmoid,
    kerv_sigmoid_dial,
)

__all__ = [
    "AffineFit",
    "DialFit",
    "Dialled",
    "GaussDial2d",
    "GaussKervolution2d",
    "KervGauss",
    "KervL1",
    "KervL2",
    "KervLinear",
    "KervPoly",
    "KervSigmoid",
    "Kervolution2d",
    "L1Kervolution2d",
    "L2Dial2d",
    "L2Kervolution2d",
    "LinearKervolution2d",
    "NeutralFit",
    "PolyDial2d",
    "PolyKervolution2d",
    "ScaleFit",
    "SigmoidDial2d",
    "SigmoidKervolution2d",
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
]
