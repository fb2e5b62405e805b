"""output_dir: written to by every host, one folder for all of them, with room for the run's checkpoints."""

from pathlib import Path

from dialogpt_ds.doctor.facts import Seen
from dialogpt_ds.doctor.finding import Finding, by_host, ok, problem, warning
from dialogpt_ds.doctor.survey import Survey

OUTPUT_DIR = "output_dir"


def output_findings(seen: Seen, output_dir: Path, checkpoint: int, export: int, keep: int) -> list[Finding]:
    """Look at the disk of output_dir.

    Args:
        seen: the hosts, the first of which writes most of it.
        output_dir: absolute.
        checkpoint: bytes of a checkpoint, about; 0: not known.
        export: bytes of the exported model.
        keep: `--keep_checkpoints`.
    """
    refused = [(name, f"{facts.output_problem}, for --output_dir {output_dir}") for name, facts in seen if facts.output_problem]
    if refused:
        way_out = "name a folder that you may write to and rename folders in, on every host; a mounted bucket is none"
        return [problem(OUTPUT_DIR, text, way_out) for text in by_host(refused)]
    free = min((facts.output_free for _, facts in seen), default=0)
    # Besides those that are kept there is the best one, and the one that is being written.
    wanted = checkpoint * (keep + 2) + export
    shown = f"{_gb(free)} free"
    if free < checkpoint:
        text = f"{output_dir} has {shown}, and a single checkpoint takes about {_gb(checkpoint)}"
        return [problem(OUTPUT_DIR, text, "make room, or name a folder on another disk")]
    if free < wanted:
        text = f"{output_dir} has {shown}; {keep} checkpoints that are kept, the best, the next one and the model take about {_gb(wanted)}"
        return [warning(OUTPUT_DIR, text, "make room, or keep fewer: --keep_checkpoints 1")]
    need = f", the run's checkpoints take up to about {_gb(wanted)}" if checkpoint else ""
    return [ok(OUTPUT_DIR, f"{output_dir} can be written to, {shown}{need}")]


def shared_findings(survey: Survey, output_dir: Path) -> list[Finding]:
    """Return which hosts don't see what the first one writes to output_dir."""
    if survey.meeting is None or len(survey.answers) < 2:
        return []
    first = next(iter(survey.answers))
    if not survey.meeting.token:
        return [problem(OUTPUT_DIR, f"{first}: {survey.meeting.token_problem}, so whether it is shared is not known")]
    blind = [(name, f"what {first} writes to {output_dir} is not seen") for name, answer in survey.answers.items()
             if answer.visit and answer.visit.sees_token is False]  # fmt: skip
    if blind:
        way_out = "name a folder on a disk that all hosts share (NFS, Lustre), under the same path on each"
        return [problem(OUTPUT_DIR, text, way_out) for text in by_host(blind)]
    return [ok(OUTPUT_DIR, f"all hosts see what {first} writes there")]


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
