"""Datasets: find or download, verify and decode the published ones, read a user's own, and prepare pictures."""

from fashion_ddp.data.dataset import PUBLISHED, Dataset, fetch, load, load_for, locate, picture_settings

__all__ = ["PUBLISHED", "Dataset", "fetch", "load", "load_for", "locate", "picture_settings"]
