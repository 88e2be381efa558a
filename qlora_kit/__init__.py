"""Recipe-driven QLoRA fine-tuning and faithful export."""

__version__ = "0.1.0"
