"""What a run is: its settings, where they come from, and the names that it may use. Nothing here imports torch."""

from fashion_ddp.config.config import Config, convert, default_runs_dir, field_types

__all__ = ["Config", "convert", "default_runs_dir", "field_types"]
