"""The machine and its ranks. Importing this package imports no torch; `world` does."""
