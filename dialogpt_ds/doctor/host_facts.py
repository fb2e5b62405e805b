"""All that a host says of itself: python -m dialogpt_ds.doctor.host_facts REQUEST prints it as one line of JSON."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from dialogpt_ds.doctor import machine_facts, software_facts
from dialogpt_ds.doctor.facts import HostFacts, Request, to_line

FACTS: tuple[Callable[[Request], dict[str, Any]], ...] = (
    machine_facts.network,
    machine_facts.limits,
    machine_facts.output_folder,
    machine_facts.nvidia,
    machine_facts.build_tools,
    software_facts.code,
    software_facts.packages,
    software_facts.torch_facts,
    software_facts.deepspeed_ops,
    software_facts.requirements,
    software_facts.revision,
)


def gather(request: Request) -> HostFacts:
    """Return what this host says of itself; a part that fails is named in it, and the others are there all the same."""
    found: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for part in FACTS:
        try:
            found |= part(request)
        except Exception as error:  # a broken installation raises anything when it is imported
            failures[part.__name__] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
    of_torch = found.pop("gpus_of_torch", [])
    found["gpus"] = found.get("gpus") or of_torch
    return HostFacts(**found, failures=failures)


def main() -> int:
    """Print the answer to the request on the command line."""
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])  # as the trainer does
    with redirect_stdout(sys.stderr):  # libraries print on being imported
        line = to_line(gather(Request(**json.loads(sys.argv[1]))))
    print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
