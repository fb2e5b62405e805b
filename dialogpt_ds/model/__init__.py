"""Models, their loss, and where their weights come from."""
