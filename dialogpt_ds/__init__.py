"""Train dialogue response models of the GPT-2 family on DeepSpeed."""

__version__ = "0.1.0"
