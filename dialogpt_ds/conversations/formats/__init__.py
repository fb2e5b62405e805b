"""One file per format of conversations."""
