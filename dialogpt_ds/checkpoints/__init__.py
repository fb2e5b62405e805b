"""Checkpoints: complete or absent, checked before use, and loadable by another number of processes or another ZeRO
stage."""
