"""The training order: windows, packed rows, positions."""
