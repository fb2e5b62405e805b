"""Where parts are made: in this process, in processes of this machine, or on a Dask cluster; all are executors of
concurrent.futures."""

import collections
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from dialogpt_ds.errors import RunError, UserError

_Item = TypeVar("_Item")
DASK = "dask://"
QUEUED = 4
"""Tasks in flight for each worker: memory does not grow with the input, whichever side is slower."""


class InProcess(Executor):
    """Does the work when it is submitted."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Do it, and return its result as a future."""
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def check_executor(name: str) -> None:
    """Refuse an executor that isn't known; raises UserError."""
    if name != "local" and not name.startswith(DASK):
        raise UserError(f"--executor {name!r} is not known: local, or dask://HOST:PORT of a Dask scheduler")


@contextmanager
def open_executor(name: str, workers: int) -> Iterator[tuple[Executor, int]]:
    """Open an executor; gives it, and how many tasks it may have in flight.

    Raises:
        UserError: the Dask scheduler can't be reached, or the package distributed is missing.
    """
    if name.startswith(DASK):
        with _dask_client(name) as client:
            threads = sum(client.nthreads().values())
            yield client.get_executor(retries=3), QUEUED * max(threads, 1)
    elif workers == 1:
        yield InProcess(), 1
    else:
        # Ctrl-C goes to all processes of a terminal; the first one ends the others.
        ignore = (signal.SIGINT, signal.SIG_IGN)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), signal.signal, ignore) as pool:
            yield pool, QUEUED * workers


def _dask_client(name: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError(
            f"--executor {name!r} needs the package distributed: pip install 'dialogpt-ds[dask]'"
        ) from error
    address = name.removeprefix(DASK)
    try:
        return Client(f"tcp://{address}", timeout=10)
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(f"--executor {name!r}: no Dask scheduler answers at {address} ({error})") from error


def in_order(in_flight: int, started: Iterable[tuple[_Item, Future[Any] | None]]) -> Iterator[_Item]:
    """Yield items in their order, each when its work is done.

    Args:
        in_flight: how many may be started before the first of them is waited for.
        started: gives the next item, and its work, started then; None where there is nothing to do.

    Raises:
        RunError: a worker process was killed.
    """
    waiting: collections.deque[tuple[_Item, Future[Any] | None]] = collections.deque()

    def first() -> _Item:
        item, future = waiting.popleft()
        if future is not None:
            future.result()
        return item

    try:
        for pair in started:
            waiting.append(pair)
            if len(waiting) >= in_flight:
                yield first()
        while waiting:
            yield first()
    except (BrokenExecutor, CancelledError) as error:
        raise RunError(
            f"a worker process ended before its work ({error}); was it killed for want of memory? Finished parts are "
            "kept: run the same command again, with fewer --workers if need be"
        ) from error
    finally:
        for _, future in waiting:
            if future is not None:
                future.cancel()
