#!/usr/bin/env python3
"""Run a launcher so that SIGTERM to this process means checkpoint and end, also as a container's first process: see
--help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dialogpt_ds.launching.stoppable import main

if __name__ == "__main__":
    raise SystemExit(main())
