"""Starting a run: hosts, launchers, and the processes that they make."""
