"""Conversations as people have them, read into turns."""
