"""Tokenised WebDataset shards: cutting, writing, reading."""
