"""Build models, normalize over the global batch, and load weights to start from. Importing this needs no torch."""
