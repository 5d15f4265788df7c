"""Know the machine and its ranks. Importing this package needs no torch; `world` imports it."""

import os

# Read once, when torch is imported. torch 2.15 has a new `nccl` backend; 0 names the one that every supported torch has
# (docs/design.md says why). The user's own value wins.
os.environ.setdefault("TORCH_DIST_USE_NCCL2", "0")
