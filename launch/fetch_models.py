#!/usr/bin/env python3
"""Bring released models from the Hugging Face hub: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dialogpt_ds.commands.fetch_models import main

if __name__ == "__main__":
    raise SystemExit(main())
