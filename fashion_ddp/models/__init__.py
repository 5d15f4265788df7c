"""Architectures, batch norm over the global batch, and weights to start from. Importing it imports no torch."""
