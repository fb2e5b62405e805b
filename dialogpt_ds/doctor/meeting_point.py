"""The first host's part in looking at the network: python -m dialogpt_ds.doctor.meeting_point PORT FOLDER TOKEN.

It listens at the master port for as long as its standard input stays open, and leaves a file of the token's name in the folder.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from dialogpt_ds.distributed.rendezvous import listen_everywhere
from dialogpt_ds.doctor.machine_facts import port_problem
from dialogpt_ds.launching.machine_checks import existing_part

MEETING_MARK = "dialogpt-doctor-meeting "
OPEN_SECONDS = 60.0


def first_address() -> str:
    """Return the address that DeepSpeed's launcher takes of the first host: the first that `hostname -I` says."""
    try:
        said = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=5.0, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(said.split()), "")


def accept_all(port: int) -> None:
    """Take every connection and close it."""
    server = listen_everywhere(port, 512)
    while True:
        server.accept()[0].close()


def main() -> int:
    """Listen until standard input ends; returns 0."""
    port, token = int(sys.argv[1]), existing_part(Path(sys.argv[2])) / sys.argv[3]
    answer: dict[str, Any] = {
        "address": first_address(),
        "port_problem": port_problem(port),
        "token": str(token),
        "token_problem": "",
    }
    if not answer["port_problem"]:
        threading.Thread(target=accept_all, args=(port,), daemon=True).start()
    try:
        token.write_text("")
    except OSError as error:
        answer["token_problem"] = f"{token.parent} can't be written to ({error.strerror})"
    print(MEETING_MARK + json.dumps(answer), flush=True)
    reader = threading.Thread(target=sys.stdin.read, daemon=True)
    reader.start()
    reader.join(OPEN_SECONDS)
    token.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
