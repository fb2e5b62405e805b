"""The processes of a run: how they find each other, agree, wait, notice each other's end, and part."""
