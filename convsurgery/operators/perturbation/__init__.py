"""Perturbation layers, Juefei-Xu et al. 2018: fixed noise, a nonlinearity and a learned 1x1 mix."""

from convsurgery.operators.perturbation.layer import Perturbation2d
from convsurgery.operators.perturbation.op import perturbation
from convsurgery.operators.perturbation.pnn import Pnn

__all__ = ["Perturbation2d", "Pnn", "perturbation"]
