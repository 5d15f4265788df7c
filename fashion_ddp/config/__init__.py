"""What a run is: its settings, where they come from, and the names that it may use. Nothing here imports torch."""

from fashion_ddp.config.config import Config, convert, field_types

__all__ = ["Config", "convert", "field_types"]
