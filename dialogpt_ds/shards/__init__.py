"""Tokenised WebDataset shards: the format, written, read, checked, and fetched from remote places."""
