"""Recipes of the literature: what they do beside choosing masks and phases."""

from semisparse.recipes.decay import MaskedDecay

__all__ = ["MaskedDecay"]
