"""What trains a model: batches, steps, sync points, checkpoints and records."""
