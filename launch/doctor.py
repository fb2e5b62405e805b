#!/usr/bin/env python3
"""Look at the hosts, the software and the configuration of a run before it starts: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dialogpt_ds.commands.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
