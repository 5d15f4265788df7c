"""What `python -m fashion_ddp.compare` says: results, tables, figures, page. It reads run folders and nothing else."""
