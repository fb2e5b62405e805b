"""A pool of gloo ranks that tests send functions to: starting ranks takes seconds, so they are started once."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from dialogpt_ds.distributed.world import World, free_port


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from dialogpt_ds.commandline import quiet_libraries
    from dialogpt_ds.distributed.world import join_world, prepare_cpu, prepare_environment

    world = World(rank, size, rank)
    prepare_environment(world)
    quiet_libraries()
    prepare_cpu(world)
    join_world(world)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # the tests have ended
            os._exit(0)
        try:
            pipe.send((True, function(world, *arguments)))
        except Exception:  # whatever the test body raised belongs to the test
            pipe.send((False, traceback.format_exc()))


class RankPool:
    """`size` processes in one gloo group."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, port, theirs)
            )  # no daemon: a rank may have loader processes
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 180.0) -> list[Any]:
        """Run `function(world, *arguments)` on every rank and return the results by rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                raise AssertionError(f"rank {rank} gave no answer in {timeout} s")
            answers.append(
                pipe.recv()
            )  # of all, before one fails the test: what is left in a pipe would be the next test's
        for rank, (good, result) in enumerate(answers):
            assert good, f"rank {rank}:\n{result}"
        return [result for _, result in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
