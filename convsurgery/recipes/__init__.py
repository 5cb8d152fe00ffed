"""The whole way from one file: model, conversion, calibration, fine-tuning and export."""

from convsurgery.recipes.runner import run_recipe
from convsurgery.recipes.schema import Recipe, read_recipe

__all__ = ["Recipe", "read_recipe", "run_recipe"]
