#!/usr/bin/env python3
"""Look into a shard directory, and verify it: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dialogpt_ds.preprocessing.inspect import main

if __name__ == "__main__":
    raise SystemExit(main())
