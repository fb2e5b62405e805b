#!/usr/bin/env python3
"""Train a dialogue response model, under deepspeed, torchrun, or plain python: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dialogpt_ds.commands.train import main

if __name__ == "__main__":
    raise SystemExit(main())
