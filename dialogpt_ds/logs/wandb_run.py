"""wandb on rank 0: in a thread of its own, so that a server that is down or hangs holds up nobody."""

import contextlib
import json
import os
import queue
import random
import string
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.errors import first_line
from dialogpt_ds.logs.metrics import REPLIES_TABLE, STEP
from dialogpt_ds.logs.record import LogRecord
from dialogpt_ds.logs.text_logs import METRICS_FILE, REPLIES
from dialogpt_ds.logs.wandb_mode import Mode, choose_mode, server
from dialogpt_ds.logs.wandb_service import answers, end_service, quiet_teardown
from dialogpt_ds.redaction import without_secrets

INIT_SECONDS = 60.0
FINISH_SECONDS, HURRY_SECONDS, UPLOAD_SECONDS = 60.0, 10.0, 3_600.0
"""Longest wait for the server: at the end of a run, where it was stopped or failed, and with a model to upload."""
MOST_WAITING = 10_000
"""Records that wait for a server that is slow to begin; more would fill the memory."""
FLUSH_SECONDS = 5.0
"""Between the times when wandb brings what it took to the disk; what is killed after HURRY_SECONDS has all of it
there."""
TABLE_SECONDS = 20.0
SILENT_SECONDS = 3.0
"""A wait that takes longer is said."""
ALWAYS_RECENT = 20
"""Rows that are kept to be logged once more, however long ago wandb got them."""
LET_GO_SECONDS = 5.0
"""wandb's own, to write down what it could not send."""
WANDB_FOLDER = "wandb"
"""wandb's own, in output_dir."""


class WandbError(Exception):
    """wandb can't go on; the message is wandb's own."""


class WandbRun:
    """A run that takes metrics until wandb fails. Nothing in it waits, but `finish`, and that for a bounded time."""

    name = "wandb"

    def __init__(
        self,
        arguments: TrainingArguments,
        output_dir: Path,
        facts: Callable[[], dict[str, Any]],
        run_id: str | None,
        first_step: int,
    ) -> None:
        """Prepare the run.

        Args:
            arguments: of the command line.
            output_dir: of the run; wandb's own folder is made in it.
            facts: returns what wandb shows as its configuration; asked in wandb's thread, since it may read from a
                remote place.
            run_id: that of the checkpoint that is resumed from.
            first_step: its step, or 0.
        """
        self.mode: Mode = "offline"
        self.why = ""
        self._failure: Exception | None = None
        self._said = False
        """Whether a person has been told of the failure."""
        # At exit it would wait for a server that hangs, to report on itself.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            self.mode, self.why = choose_mode(arguments.wandb_mode)
            if self.mode != "disabled":
                import wandb  # noqa: F401 (here, since a loader that is forked during an import could wait for its lock for ever)
        except Exception as error:  # of its settings, or of whatever it imports
            self._failure = error
        self._resumed = run_id is not None
        self.run_id = run_id or (None if self.mode == "disabled" else new_id())
        self._arguments, self._folder, self._first_step = arguments, output_dir, first_step
        self._facts = cache(facts)
        self._metrics_file = Path(arguments.log_dir or output_dir).expanduser() / METRICS_FILE
        self._records: queue.Queue[LogRecord | None] = queue.Queue(MOST_WAITING)
        self._tables: queue.Queue[LogRecord | None] = queue.Queue()
        self._recent: deque[tuple[float, dict[str, Any]]] = deque()
        """Rows that wandb may not have brought to the disk yet, with the time when it got them."""
        self._ending: tuple[int, Path | None] = (0, None)
        self._given_up = False
        """Whether nobody waits for the thread any more."""
        self._run: Any = None
        self._run_folder: Path | None = None
        self._url: str | None = None
        self._thread: threading.Thread | None = None
        if self.mode != "disabled":
            sys.argv[1:] = without_secrets(sys.argv[1:])  # which it keeps
            output_dir.mkdir(parents=True, exist_ok=True)

    @property
    def mode_text(self) -> str:
        """What the start-up table says."""
        if self.mode == "disabled":
            return "off"
        where = f"project {self._arguments.wandb_project}, run {self.run_id}"
        return f"{self.mode}{f' ({self.why})' if self.why else ''}, {where}"

    def take(self, record: LogRecord) -> None:
        """Hand a record to the thread; raises WandbError where that has failed."""
        if self.mode == "disabled":
            return
        if self._failure is not None:
            self._said = True
            raise WandbError(str(self._failure)) from self._failure
        if (
            self._thread is None
        ):  # not before there is something, so that mostly the loader's processes are forked by now
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()
        try:
            self._records.put_nowait(record)
        except queue.Full as error:
            raise WandbError(f"{server()} takes nothing, and {MOST_WAITING:,} records wait for it") from error

    def close(self) -> None:
        """Nothing: see `finish`."""

    @property
    def _finish_seconds(self) -> float:
        """Longest wait for the server at the end; wandb's own WANDB_FINISH_TIMEOUT wins."""
        usual = UPLOAD_SECONDS if self._arguments.wandb_artifacts else FINISH_SECONDS
        return float(os.environ.get("WANDB_FINISH_TIMEOUT") or usual)

    @property
    def _table_seconds(self) -> float:
        """Longest wait for the last table."""
        return min(TABLE_SECONDS, self._finish_seconds)

    def finish(self, exit_code: int, hurry: bool, model: Path | None) -> list[str]:
        """End the run, waiting for the server for a bounded time; returns what is left for a person to do.

        Args:
            exit_code: of this run.
            hurry: wait for HURRY_SECONDS at most.
            model: exported folder, to be an artifact with the table of evaluations; None for none.
        """
        if self._thread is None:
            return []
        self._ending = (exit_code, model)
        with contextlib.suppress(queue.Full):
            self._records.put_nowait(None)
        seconds = HURRY_SECONDS if hurry else self._finish_seconds
        stuck = not self._ends_in(seconds, 0.0 if hurry else self._table_seconds + LET_GO_SECONDS)
        if stuck:
            self._given_up = True
            end_service()
        late = stuck or isinstance(self._failure, TimeoutError)
        # Offline all folders of a run that was resumed; online this one, since what is sent twice may count twice.
        what = f"wandb sync {self._folder / WANDB_FOLDER}/offline-run-*-{self.run_id}"
        if self.mode == "online":
            what = f"wandb sync --include-online {self._run_folder or self._folder / WANDB_FOLDER}"
        look = f"wandb leet {self._folder / WANDB_FOLDER}"
        if late:
            return [f"wandb: {server()} did not take everything in {seconds:g} s; the rest, when it does: {what}"] + (
                ["wandb: the artifacts are not in it, but where the model and the logs are"] if model else []
            )
        if self._failure is not None:
            failed = [] if self._said else [f"wandb failed: {self._failure}"]
            return failed + (
                [f"wandb: what it had before it failed is in {self._run_folder}: {what}"] if self._run_folder else []
            )
        if self.mode == "offline":
            return [f"wandb: look at it with {look}; upload it with {what}"]
        return [f"wandb: {self._url}"] if self._url else []

    def _ends_in(self, seconds: float, grace: float) -> bool:
        """Return whether the thread ends in time, or a little later; a person may end the wait where there is a
        grace."""
        assert self._thread is not None
        try:
            self._thread.join(min(seconds, SILENT_SECONDS))
            if self._thread.is_alive() and grace:
                print(
                    f"wandb is sending the rest, for {seconds:,.0f} s or a little more (Ctrl-C leaves it for later)",
                    flush=True,
                )
            self._thread.join(max(seconds + grace - SILENT_SECONDS, 0.0))
        except KeyboardInterrupt:  # after it Python 3.11 takes the thread for ended
            print("not waiting for wandb any more", file=sys.stderr, flush=True)
            return False
        return not self._thread.is_alive()

    def _work(self) -> None:
        """What the thread does: from wandb's start to its end."""
        try:
            self._start()
            tables = threading.Thread(target=self._log_tables, name="wandb-tables", daemon=True)
            tables.start()
            while (record := self._records.get()) is not None:
                self._log(record.values)
                if record.replies:
                    self._tables.put(record)
            self._tables.put(None)
            tables.join(self._table_seconds)
            exit_code, model = self._ending
            if model is not None:
                self._log_artifacts(model)
            self._finish_run(exit_code)
        except Exception as error:  # whatever wandb raises, the run goes on without it
            quiet_teardown()
            self._failure = error

    def _log(self, row: dict[str, Any]) -> None:
        """Log a row; where wandb's process was ended, as by a launcher that ends what is below it, with another
        process."""
        now = time.monotonic()
        while len(self._recent) > ALWAYS_RECENT and now - self._recent[0][0] > 2 * FLUSH_SECONDS:
            self._recent.popleft()
        self._recent.append((now, row))
        try:
            self._run.log(row)
        except Exception:
            if self._given_up:
                raise
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Log in another process of wandb's all that the one that was ended may not have written down."""
        end_service()
        self._init()
        for _, earlier in self._recent:
            self._run.log(earlier)

    def _finish_run(self, exit_code: int) -> None:
        """End wandb's run; where its process was ended, as in `_log`."""
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            if self._given_up or isinstance(error, TimeoutError):  # which is the server's, not the process's
                raise
            self._begin_anew()
            self._run.finish(exit_code=exit_code)

    def _catch_up(self) -> None:
        """Give a resumed run what its server never got, because an earlier process was killed or was offline."""
        there = self._run.summary.get("step")
        for row in rows_in(self._metrics_file):
            if row["step"] > (there or 0) and row["step"] <= self._first_step:
                self._run.log(row)

    def _start(self) -> None:
        """Start wandb's run: online where its server answers, else offline."""
        if self.mode == "online" and not answers(server()):
            self._go_offline(f"{server()} does not answer")
        try:
            self._init()
        except Exception as error:  # of the server, or since its own process was ended meanwhile
            if self.mode == "online":
                self._go_offline(f"{server()}: {first_line(error)}")
            end_service()  # in it the id is taken
            self._init()
        if self._resumed and self.mode == "online":
            self._catch_up()

    def _go_offline(self, why: str) -> None:
        self.mode, self.why = "offline", why
        print(f"warning: wandb is offline in this run: {without_secrets(why)}", file=sys.stderr, flush=True)

    def _init(self) -> None:
        import wandb

        a = self._arguments
        settings = wandb.Settings(
            silent=True, init_timeout=INIT_SECONDS, finish_timeout=self._finish_seconds, finish_timeout_raises=True,
            disable_git=True, disable_code=True, x_save_requirements=False,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
        )  # fmt: skip
        mode: Any = self.mode
        run = wandb.init(
            project=a.wandb_project, entity=a.wandb_entity or None, name=a.wandb_run_name or self._folder.name,
            tags=a.wandb_tags or None, group=a.wandb_group or None, job_type=a.wandb_job_type or None,
            dir=str(self._folder), config=self._facts(), mode=mode, id=self.run_id, resume="allow", settings=settings,
        )  # fmt: skip
        self._run_folder, self._url = Path(run.dir).parent, run.url
        # Our own step is the axis, so that wandb's never refuses a point after a resume.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def _log_tables(self) -> None:
        """What another thread does, since wandb asks its server about each table, and metrics are not to wait for
        that."""
        import wandb

        failed = False
        while (record := self._tables.get()) is not None:
            step = record.values["step"]
            try:
                table = wandb.Table(
                    columns=["step", "prompt", "reply"], data=[[step, *reply] for reply in record.replies]
                )
                self._run.log({STEP: step, REPLIES_TABLE: table})
            except Exception as error:  # the next one may get there
                if not failed:
                    print(
                        f"warning: wandb did not take the replies of step {step:,}, which are in {REPLIES}: "
                        f"{without_secrets(str(error))}",
                        file=sys.stderr,
                        flush=True,
                    )
                failed = True

    def _log_artifacts(self, model: Path) -> None:
        import wandb

        try:
            folder = wandb.Artifact(
                f"model-{self.run_id}", type="model", description=f"{model.parent.name}, exported at its last step"
            )
            folder.add_dir(str(model))
            self._run.log_artifact(folder)
            columns, rows = evaluations_in(self._metrics_file)
            evaluations = wandb.Artifact(f"evaluations-{self.run_id}", type="evaluation")
            evaluations.add(wandb.Table(columns=columns, data=rows), "evaluations")
            self._run.log_artifact(evaluations)
        except Exception as error:  # the run itself can be ended all the same
            print(
                f"warning: wandb did not take the artifacts: {without_secrets(str(error))}", file=sys.stderr, flush=True
            )


def evaluations_in(metrics: Path) -> tuple[list[str | int], list[list[Any]]]:
    """Return the columns and rows of all evaluations in a metrics.jsonl."""
    rows = [row for row in rows_in(metrics) if "eval_loss" in row]
    columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(str(name)) for name in columns] for row in rows]


def rows_in(metrics: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl that is at work."""
    with open(metrics, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def new_id() -> str:
    """Return an id for a run: 8 letters and digits, whatever the seed of training."""
    return "".join(random.SystemRandom().choices(string.ascii_lowercase + string.digits, k=8))
