"""One rank of two on hosts that count as two: python contact_rank.py SECONDS HOW, with RANK and the like set.

HOW is what rank 1 does when the time is over: leave, or die. Rank 0 waits for it in a collective that nothing else
ends. With HOW stranger, somebody else connects to rank 0 first and says nothing, and rank 0 takes no more than one
connection before its time is up.
"""

import os
import signal
import socket
import sys
import time
from datetime import timedelta

import torch

from dialogpt_ds.distributed import host_watch as contact
from dialogpt_ds.distributed.world import world_from_environment
from dialogpt_ds.launching.processes import adopt_scheduler, is_task_of_scheduler


def play_stranger() -> None:
    """Connect to rank 0's listener before the hosts do, and leave rank 0 no time for more than that connection."""
    real = contact._listener
    strangers = []

    def listener(num_hosts: int) -> socket.socket:
        made = real(num_hosts)
        strangers.append(socket.create_connection(("127.0.0.1", made.getsockname()[1])))
        contact.CONTACT_SECONDS = 0.5
        return made

    contact._listener = listener
    contact.WORD_SECONDS = 1.0


def main() -> None:
    """Meet, watch, and part as it was asked for."""
    seconds, how = float(sys.argv[1]), sys.argv[2]
    adopt_scheduler()
    world = world_from_environment()
    if not is_task_of_scheduler():
        contact._place = lambda: str(world.rank)
    if how == "stranger":
        play_stranger()
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=600))
    with contact.HostWatch(world, timeout=90) as line:
        print("notes", line.connect(), flush=True)
        if how == "stranger":
            time.sleep(contact.SPEAKING_SECONDS + 2)  # a lost line would end the run by then
        elif world.rank == 1 or how == "leave":
            time.sleep(seconds)
        if how == "die":
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # as in a collective of NCCL, which notices nothing
    torch.distributed.destroy_process_group()
    print("parted", flush=True)


main()
