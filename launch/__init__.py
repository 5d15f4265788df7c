"""Start many runs: on this machine (local.py), or on a SLURM cluster (submit.py)."""

import fashion_ddp  # noqa: F401 - which says it where this Python has none of our packages
