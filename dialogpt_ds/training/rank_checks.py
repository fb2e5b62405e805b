"""The start of a run, once the ranks have come together: one folder, one configuration, one checkpoint to go on from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.checkpoints.folder import CheckpointFolder
from dialogpt_ds.checkpoints.universal import convert
from dialogpt_ds.distributed.collectives import different_from_first
from dialogpt_ds.distributed.hang_watch import HangWatch
from dialogpt_ds.distributed.lone_work import Tell, first_works
from dialogpt_ds.errors import RunError
from dialogpt_ds.files import sha256_of_json
from dialogpt_ds.training.resume import Choice, choose
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.versions import code_sha256, versions


@dataclass(frozen=True)
class Beginning:
    """What a run goes on from."""

    choice: Choice | None
    """None: it starts from nothing."""
    path: Path | None
    """The folder to load: the checkpoint, or its conversion."""
    notes: list[str] = field(default_factory=list)
    """What a person should be told; of rank 0 alone."""


def begin(settings: Settings, watch: HangWatch, device: torch.device) -> Beginning:
    """Put the folder in order, and find and prepare what the run goes on from. Collective: every rank must call.

    Raises:
        UserError: on every rank; see choose().
        RunError: on every rank; they were not given the same run, the folder can't be put in order, or the checkpoint can't be converted.
    """
    folder = CheckpointFolder(settings.output_dir)
    notes: list[str] = []
    first_works(folder.clean, "removing what an earlier process left unfinished", settings.world, watch, device)
    watch.beat("checking the checkpoints")
    choice = choose(settings, device, notes.append)
    check_same_run(settings, choice)
    if choice is None:
        return Beginning(None, None, notes)
    if settings.arguments.continue_from and settings.world.is_first:
        left = folder.leave_behind(choice.step)
        if left:
            notes.append(
                f"--continue_from {choice.step}: the checkpoints after it are of another history now; renamed to {', '.join(left)}"
            )
    path = _converted(settings, folder, choice, watch, device) if choice.bridged else folder.path(choice.step)
    return Beginning(choice, path, notes)


def _converted(settings: Settings, folder: CheckpointFolder, choice: Choice, watch: HangWatch, device: torch.device) -> Path:
    """Return the folder of the conversion, which rank 0 makes while the others wait; it alone holds the lock of output_dir."""

    def conversion(tell: Tell) -> Path:
        return convert(folder, choice.summary, lambda line: print(line, flush=True), tell)

    doing = f"converting checkpoint {folder.path(choice.step)} for this run"
    return first_works(conversion, doing, settings.world, watch, device)


def check_same_run(settings: Settings, choice: Choice | None) -> None:
    """Refuse ranks that were not given the same run, such as by an old copy of the data on one node. Collective.

    Raises:
        RunError: on every rank, naming the ranks that differ from rank 0 and in what.
    """
    arguments = settings.arguments
    facts: dict[str, Any] = {
        **{f"version of {name}": installed for name, installed in versions().items()},
        "code of dialogpt_ds": code_sha256(),
        "train_input_file (fingerprints of its manifests)": settings.order_key,
        "eval_input_file (fingerprint of its manifest)": settings.evaluation and settings.evaluation.manifest.fingerprint,
        "batch": settings.batch,
        "DeepSpeed configuration": settings.deepspeed,
        "num_optim_steps": arguments.num_optim_steps,
        "valid_step": arguments.valid_step,
        "save_step": settings.save_step,
        "on_bad_block": arguments.on_bad_block,
        "changed_order": arguments.changed_order,
        "sample_prompts": (settings.sample_prompts, arguments.sample_max_new_tokens, arguments.seed),
        "model": settings.model.shape(),
        "checkpoint that is gone on from": choice and (choice.step, choice.bridged),
    }
    different = different_from_first({name: sha256_of_json(repr(value)) for name, value in facts.items()})
    if different:
        raise RunError(
            "the ranks were not all given the same run. These differ from rank 0:\n  "
            + "\n  ".join(f"{name}: rank {', '.join(map(str, ranks))}" for name, ranks in different.items())
            + "\nDo all nodes have the same environment, and the same copy of the code, the data and the configuration? "
            "python launch/doctor.py --hostfile HOSTS compares them."
        )
