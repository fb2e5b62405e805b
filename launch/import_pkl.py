#!/usr/bin/env python3
"""Make a Hugging Face folder of a DialoGPT .pkl file: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dialogpt_ds.commands.import_pkl import main

if __name__ == "__main__":
    raise SystemExit(main())
