"""The doctor's command: launch/doctor.py and dialogpt-doctor."""

from dialogpt_ds.commandline import parse, run_command
from dialogpt_ds.doctor.configuration import DoctorArguments
from dialogpt_ds.doctor.examination import Examination
from dialogpt_ds.doctor.report import Report
from dialogpt_ds.doctor.tasks import Clock
from dialogpt_ds.errors import EXIT_DONE, EXIT_RUN_FAILED

REPORT_SECONDS = 55.0
"""The report is complete by then, whatever hangs."""
DESCRIPTION = (
    "Look at the hosts, the software and the configuration of a run before it starts, in less than a minute. Takes the "
    "run's own arguments, and --hostfile, --num_gpus, --master_port, --master_addr and --ssh_port of the deepspeed "
    "launcher. Exit code 1 when training would fail, 0 otherwise."
)


def main(argv: list[str] | None = None) -> int:
    """Examine; returns the exit code."""
    return run_command(lambda: _doctor(argv))


def _doctor(argv: list[str] | None) -> int:
    parsed = parse(DoctorArguments, DESCRIPTION, argv)
    report = Report(Clock(REPORT_SECONDS))
    Examination(parsed, report).run()
    report.say(report.closing_line())
    return EXIT_RUN_FAILED if report.num_problems else EXIT_DONE
