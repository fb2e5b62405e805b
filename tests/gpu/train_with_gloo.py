#!/usr/bin/env python3
"""launch/train.py with gloo between the processes, which, unlike NCCL, lets several of them share a GPU."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dialogpt_ds.commands import train as command

if __name__ == "__main__":
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        from deepspeed.accelerator import get_accelerator

        accelerator = type(get_accelerator())
        accelerator.communication_backend_name = lambda self: "gloo"
        accelerator._communication_backend_name = "gloo"
    raise SystemExit(command.main())
