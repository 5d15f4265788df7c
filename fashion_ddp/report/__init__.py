"""Make the report of `python -m fashion_ddp.compare` from run folders alone."""
