"""Recipes of the literature as one-line choices: masks, phases, decay and optimizer that belong together."""

from semisparse.recipes.decay import MaskedDecay
from semisparse.recipes.presets import PRESETS, dinov2, fastest, fst, s_ste, safest, sr_ste, step
from semisparse.recipes.recipe import Recipe
from semisparse.recipes.recipe_schedule import RecipeSchedule
from semisparse.recipes.step_adamw import StepAdamW

__all__ = [
    "PRESETS",
    "MaskedDecay",
    "Recipe",
    "RecipeSchedule",
    "StepAdamW",
    "dinov2",
    "fastest",
    "fst",
    "s_ste",
    "safest",
    "sr_ste",
    "step",
]
