"""Weights & Biases behind a guard, and what is shown there."""
