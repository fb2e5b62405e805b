"""One dictionary per logged step, built once, goes to every place a person may look at."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.logs.progress import Progress
from dialogpt_ds.logs.record import LogRecord, Sink
from dialogpt_ds.logs.tensorboard import TensorBoard
from dialogpt_ds.logs.text_logs import TextLogs
from dialogpt_ds.logs.wandb_run import WandbRun
from dialogpt_ds.redaction import without_secrets


class Recorder:
    """Files first, then the terminal, TensorBoard and wandb. A sink that fails is reported once and left out. Exists on
    rank 0 only."""

    def __init__(
        self,
        arguments: TrainingArguments,
        output_dir: Path,
        log_dir: Path,
        first_step: int = 0,
        wandb_id: str | None = None,
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Open every sink.

        Args:
            arguments: of the command line: which sinks there are.
            output_dir: of the run.
            log_dir: folder of the text files, output_dir or another.
            first_step: the step that is resumed from, to which the files are cut back; 0 at a run's start.
            wandb_id: the run that is resumed.
            facts: returns what wandb shows as the run's configuration.
        """
        self.progress = Progress(arguments.num_optim_steps, first_step, arguments.pbar)
        self.sinks: list[Sink] = [TextLogs(log_dir, first_step), self.progress]
        if arguments.tensorboard:
            try:
                self.sinks.append(TensorBoard(log_dir, first_step))
            except Exception as error:  # see record
                print(
                    f"warning: TensorBoard's files can't be written, and are left out: {error}",
                    file=sys.stderr,
                    flush=True,
                )
        self.wandb = WandbRun(arguments, output_dir, facts, wandb_id, first_step)
        self.sinks.append(self.wandb)

    def record(self, record: LogRecord) -> None:
        """Give a record to every sink."""
        for sink in list(self.sinks):
            try:
                sink.take(record)
            except Exception as error:  # whatever a sink meets, the run goes on without it
                self._leave_out(sink, error)

    def say(self, line: str) -> None:
        """Print a line."""
        if self.progress not in self.sinks:
            return
        try:
            self.progress.say(line)
        except Exception as error:  # see record
            self._leave_out(self.progress, error)

    def say_last(self, text: str) -> None:
        """Print when the terminal's bar is gone."""
        with contextlib.suppress(Exception):  # nobody reads any more
            if text:
                print(without_secrets(text), flush=True)

    def close_files(self) -> None:
        """Finish everything but wandb, which may have something to wait for."""
        for sink in [sink for sink in self.sinks if sink is not self.wandb]:
            try:
                sink.close()
            except Exception as error:  # see record
                self._leave_out(sink, error)

    def finish_wandb(self, exit_code: int, hurry: bool, model: Path | None) -> list[str]:
        """End the wandb run, waiting for its server for a bounded time; returns notes for the user.

        Args:
            exit_code: of this run.
            hurry: wait for less time, since others wait for this process.
            model: exported folder, for an artifact; None for none.
        """
        try:
            return self.wandb.finish(exit_code, hurry, model)
        except Exception as error:  # see record
            self._leave_out(self.wandb, error)
            return []

    def _leave_out(self, sink: Sink, error: Exception) -> None:
        if sink in self.sinks:
            self.sinks.remove(sink)
        if sink is self.progress:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (nobody reads any more, and Python would fail once more at its end)
        with contextlib.suppress(OSError):  # the terminal is gone
            said = without_secrets(f"warning: {sink.name} failed and is left out from here on: {error!r}")
            print(said, file=sys.stderr, flush=True)
