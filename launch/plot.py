#!/usr/bin/env python3
"""Draw and compare the curves of training runs: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dialogpt_ds.commands.plot import main

if __name__ == "__main__":
    raise SystemExit(main())
