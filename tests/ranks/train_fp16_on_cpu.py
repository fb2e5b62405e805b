#!/usr/bin/env python3
"""launch/train.py with DeepSpeed told that this CPU computes in fp16: its real fp16 optimizers and loss scaler then run
in tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepspeed.accelerator import get_accelerator

from dialogpt_ds.commands.train import main

if __name__ == "__main__":
    type(get_accelerator()).is_fp16_supported = lambda self: True
    raise SystemExit(main())
