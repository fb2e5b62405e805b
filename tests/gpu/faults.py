"""Checks that fail in every way, for the test of what runs them."""

import os
import signal
import sys
import time

from tests.gpu.common import checked, report

if __name__ == "__main__":
    name = sys.argv[1]
    if name == "hangs":
        print("before the end", flush=True)
        time.sleep(600)
    elif name == "ends":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "fails":
        with checked("fails.here"):
            raise AssertionError("1 is not 2")
    else:
        report("passes", True, 0.0, figure=1)
