"""lctrain: train language models on very long sequences over many processes."""

__version__ = "0.1.0"
