"""Datasets: found, else downloaded; verified and decoded; and those of one's own."""

from fashion_ddp.data.dataset import PUBLISHED, Dataset, fetch, load, locate

__all__ = ["PUBLISHED", "Dataset", "fetch", "load", "locate"]
