#!/usr/bin/env python3
"""Print a trained model's reply to each prompt: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dialogpt_ds.commands.replies import main

if __name__ == "__main__":
    raise SystemExit(main())
