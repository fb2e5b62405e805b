"""The project's wandb dashboard: what is on it as plain data, and how it comes to wandb."""
