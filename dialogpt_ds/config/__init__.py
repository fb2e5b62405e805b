"""Command line, DeepSpeed JSON, schedules, and what really runs."""
