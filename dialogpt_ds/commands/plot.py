"""The command that draws the curves of training runs and prints a table to compare them."""

import dataclasses
import sys

from dialogpt_ds.commandline import option, parse, run_command
from dialogpt_ds.errors import EXIT_DONE, UserError
from dialogpt_ds.plots.curves import checked_picture, save_curves
from dialogpt_ds.plots.runs import read_runs
from dialogpt_ds.plots.table import comparison_table


@dataclasses.dataclass
class PlotArguments:
    """Options of the plot command."""

    runs: list[str] = option([], positional=True)
    """Runs to draw: output_dir folders of training, or metrics.jsonl files."""
    output: str = option("curves.png", "-o")
    """Picture to write, .png or .svg; an earlier one is replaced."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _plot(argv))


def _plot(argv: list[str] | None) -> int:
    description = "Draw the curves of one or several training runs and print a table to compare them."
    arguments = parse(PlotArguments, description, argv).arguments
    output = checked_picture(arguments.output, "--output")
    runs = read_runs(arguments.runs)
    for note in (run.note for run in runs if run.note):
        print(f"note: {note}", file=sys.stderr)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_curves(runs, output)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output {output}: cannot be written ({reason}); choose another place") from error
    print(comparison_table(runs))
    print(f"\nCurves: {output}")
    return EXIT_DONE
