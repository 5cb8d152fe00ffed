"""Reaction-diffusion steps: convolutions as cheap discretised partial differential equations."""

from convsurgery.operators.diffusion.layer import ReactionDiffusion2d
from convsurgery.operators.diffusion.op import reaction_diffusion

__all__ = ["ReactionDiffusion2d", "reaction_diffusion"]
