"""What all ranks must have in common: one folder, kept from other runs, in which checkpoints can be saved, and one
run."""

import socket
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dialogpt_ds.distributed.collectives import all_gather, broadcast_from_rank0, differs_from_rank0
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.files import appears, rename_problem, sha256_of_json
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.versions import code_sha256, versions

OUTPUT_LOCK = ".lock"
LOCK_SECONDS = 20.0
"""How long a run waits for the lock: loader processes of one that was killed hold it for a few seconds more."""
TOKEN_SECONDS = 15.0
"""How long another node may take to see a new file on a shared disk."""


def lock_output(output_dir: Path) -> FileLock:
    """Keep other runs out of output_dir for as long as this process lives; rank 0 only.

    Raises:
        UserError: another run is at work in it.
    """
    lock = FileLock(output_dir / OUTPUT_LOCK)
    try:
        lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.5)
    except Timeout as error:
        raise UserError(
            f"--output_dir {output_dir}: another run is at work in it (it holds {output_dir / OUTPUT_LOCK}); wait for "
            "its end, or name another folder"
        ) from error
    return lock


def check_renames(output_dir: Path, is_first: bool) -> None:
    """Refuse an output_dir in which no checkpoint could be saved, now rather than after save_step steps. Collective:
    every rank must call.

    Raises:
        UserError: on every rank.
    """
    problem = broadcast_from_rank0(rename_problem(output_dir) if is_first else "")
    if problem:
        raise UserError(
            f"--output_dir {output_dir}: {problem}. A checkpoint is written and flushed there, and gets its name by "
            f"the rename of "
            "its folder once it is whole, so none could be saved. Name a folder on a local disk, NFS or Lustre; a "
            "mounted bucket (s3fs, "
            "gcsfuse, Mountpoint for S3) is for copies of it"
        )


def check_shared(output_dir: Path, is_first: bool) -> None:
    """Refuse an output_dir that is not one place for all ranks. Collective: every rank must call.

    Raises:
        UserError: on every rank, with the ranks and hosts that don't see what rank 0 writes there.
    """
    token = output_dir / f".token-{broadcast_from_rank0(uuid.uuid4().hex)}"
    if is_first:
        token.write_text("")
    all_gather(None)  # now it is there
    sees = appears(token, TOKEN_SECONDS)
    seen = all_gather((socket.gethostname(), sees))
    blind = [(rank, host) for rank, (host, saw) in enumerate(seen) if not saw]
    if is_first:
        with suppress(OSError):  # where files can be made and not removed, check_renames() has something to say
            token.unlink(missing_ok=True)
    if blind:
        hosts = sorted({host for _, host in blind})
        raise UserError(
            f"--output_dir {output_dir} is not one folder for all processes: what rank 0 writes on {seen[0][0]} is not "
            f"seen by rank {', '.join(str(rank) for rank, _ in blind)} on {', '.join(hosts)}. A checkpoint would be "
            "scattered over the nodes' own disks. Name a folder on a disk that all nodes share (NFS, Lustre), under "
            "the same path on each."
        )


def check_same_run(settings: Settings, resumed_from: tuple[int, bool] | None) -> None:
    """Refuse ranks that were not given the same run, such as by an old copy of the data on one node. Collective.

    Args:
        settings: of this rank.
        resumed_from: step of the checkpoint, and whether it is to be converted.

    Raises:
        RunError: on every rank, naming the ranks that differ from rank 0 and in what.
    """
    arguments = settings.arguments
    facts: dict[str, Any] = {
        **{f"version of {name}": installed for name, installed in versions().items()},
        "code of dialogpt_ds": code_sha256(),
        "train_input_file (fingerprints of its manifests)": settings.order_key,
        "eval_input_file (fingerprint of its manifest)": settings.evaluation
        and settings.evaluation.manifest.fingerprint,
        "batch": settings.batch,
        "DeepSpeed configuration": settings.deepspeed,
        "num_optim_steps": arguments.num_optim_steps,
        "valid_step": arguments.valid_step,
        "save_step": settings.save_step,
        "on_bad_block": arguments.on_bad_block,
        "changed_order": arguments.changed_order,
        "sample_prompts": (settings.sample_prompts, arguments.sample_max_new_tokens, arguments.seed),
        "model": settings.model.shape(),
        "checkpoint that is resumed from": resumed_from,
    }
    different = differs_from_rank0({name: sha256_of_json(repr(value)) for name, value in facts.items()})
    if different:
        raise RunError(
            "the ranks were not all given the same run. These differ from rank 0:\n  "
            + "\n  ".join(f"{name}: rank {', '.join(map(str, ranks))}" for name, ranks in different.items())
            + "\nDo all nodes have the same environment, and the same copy of the code, the data and the "
            "configuration? "
            "python launch/doctor.py --hostfile HOSTS compares them."
        )
