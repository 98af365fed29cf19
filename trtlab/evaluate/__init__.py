"""Measures a model: perplexity, exact answers to questions, and what quantization costs in both."""

from trtlab.evaluate.perplexity import accuracy, divergence, perplexity
from trtlab.evaluate.quantization import RecipeComparison, compare_recipes

__all__ = ["RecipeComparison", "accuracy", "compare_recipes", "divergence", "perplexity"]
