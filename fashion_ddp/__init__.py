"""Train image classifiers with DistributedDataParallel and compare them honestly."""

__version__ = "0.1.0"
