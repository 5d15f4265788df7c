"""Mirror runs to Weights & Biases, behind a guard, and choose what is shown there."""
