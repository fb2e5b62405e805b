"""Draw and compare the curves of training runs: python launch/plot.py RUN [RUN ...] --output curves.png"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("dialogpt_ds") is None:  # not installed: take the package of this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dialogpt_ds.plots.command import main

if __name__ == "__main__":
    raise SystemExit(main())
