"""Start many runs: on this machine (local.py), or on a SLURM cluster (submit.py)."""
