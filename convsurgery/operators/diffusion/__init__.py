"""Reaction-diffusion steps: convolutions as cheap discretised partial differential equations."""

from convsurgery.operators.diffusion.layer import ReactionDiffusion2d
from convsurgery.operators.diffusion.op import reaction_diffusion
from convsurgery.operators.diffusion.rd import RDCirculant, RDExplicit, RDImplicit

__all__ = ["RDCirculant", "RDExplicit", "RDImplicit", "ReactionDiffusion2d", "reaction_diffusion"]
