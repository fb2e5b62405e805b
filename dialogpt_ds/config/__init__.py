"""Command line, DeepSpeed JSON, and what really runs."""
