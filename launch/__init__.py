"""Ways to start runs: many on this machine (local.py)."""
