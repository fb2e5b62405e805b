#!/usr/bin/env python3
"""Export a checkpoint as a Hugging Face folder: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dialogpt_ds.commands.export import main

if __name__ == "__main__":
    raise SystemExit(main())
