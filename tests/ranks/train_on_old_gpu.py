#!/usr/bin/env python3
"""launch/train.py where PyTorch says that it sees a Tesla V100, up to where the GPU itself would be used."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401 - before what follows: it would load drivers
import torch

from dialogpt_ds.commands.train import main

if __name__ == "__main__":
    del os.environ["DS_ACCELERATOR"]
    torch.cuda.is_available = lambda: True
    torch.accelerator.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.accelerator.device_count = lambda: 1
    torch.cuda.get_device_name = lambda device=None: "Tesla V100"
    torch.cuda.get_device_capability = lambda device=None: (7, 0)
    raise SystemExit(main())
