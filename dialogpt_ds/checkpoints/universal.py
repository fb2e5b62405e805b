"""Conversion of a checkpoint into DeepSpeed's universal format, from which any number of processes and any ZeRO stage
can go on.

DeepSpeed's converter puts the fragments of stages 1 to 3 together. What it leaves open is completed here, so that all
stages read
what all stages wrote: a stage-0 source, the layout and step of each parameter, and the files that hold more than one
parameter.
"""

import argparse
import contextlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.checkpoints.folder import UNIVERSAL, CheckpointFolder, Summary, checkpoint_name, difference, sums_of
from dialogpt_ds.distributed.lone_work import Tell
from dialogpt_ds.files import remove_folder, replace_text, sha256_of_file

CONTENT = "universal.json"
"""Last file of a conversion: of which checkpoint it is, and the checksums of its files."""
STATES = ("fp32", "exp_avg", "exp_avg_sq")
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""What DeepSpeed reads at stages 0 to 2, and at stage 3."""

Beat = Callable[[], None]
Parameters = Iterator[tuple[str, dict[str, torch.Tensor]]]


def universal_name(step: int) -> str:
    """Return the folder name of the conversion of the checkpoint of a step."""
    return f"{UNIVERSAL}{checkpoint_name(step)}"


class _Count:
    """Counts the files that are done, and tells of each: a large checkpoint has hundreds of thousands."""

    def __init__(self, doing: str, tell: Tell) -> None:
        self._doing, self._tell, self._number = doing, tell, 0

    def __call__(self) -> None:
        self._number += 1
        self._tell(f"{self._doing}: {self._number:,} files so far")


def convert(folder: CheckpointFolder, summary: Summary, say: Tell, tell: Tell) -> Path:
    """Convert a checkpoint, unless that is done already; returns the folder. For one process at a time.

    Args:
        folder: of the checkpoints.
        summary: of the one to convert.
        say: takes a line for a person.
        tell: is told what is being done, after each file.

    Raises:
        OSError: it can't be written.
    """
    source, target = folder.path(summary.step), folder.root / universal_name(summary.step)
    of = sha256_of_file(source / "checkpoint.json")
    if target.is_dir():
        problem = _problem(target, of, _Count(f"checking {target}", tell))
        if problem is None:
            return target
        say(f"warning: {target} is made anew: {problem}")
        remove_folder(target, _Count(f"removing {target}", tell))
    say(f"converting {source} into DeepSpeed's universal format, once")
    unfinished = folder.unfinished(target.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    _write(source, summary, unfinished, _Count(f"converting {source}", tell))
    files, summed = {}, _Count(f"reading the conversion of {source} for its checksums", tell)
    for file in sorted(file for file in unfinished.rglob("*") if file.is_file()):
        files[file.relative_to(unfinished).as_posix()] = sums_of(file)
        summed()
    replace_text(unfinished / CONTENT, json.dumps({"of": of, "files": files}, indent=2) + "\n")
    folder.publish(unfinished, target.name)
    return target


def _problem(target: Path, of: str, done: Beat) -> str | None:
    """Return why a conversion can't be used; None where it can."""
    try:
        content = json.loads((target / CONTENT).read_text(encoding="utf-8"))
        if content["of"] != of:
            return "it is of another checkpoint"
        for name, expected in content["files"].items():
            problem = difference(target, name, expected)
            if problem is not None:
                return problem
            done()
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CONTENT} can't be read: {error}"


def _write(source: Path, summary: Summary, target: Path, done: Beat) -> None:
    zero = target / "zero"
    zero.mkdir(parents=True)
    model_file = source / MODEL_FILES[0 if summary.zero_stage < 3 else 1]
    state = torch.load(model_file, map_location="cpu", weights_only=False, mmap=True)
    if summary.zero_stage == 0:
        for name, tensors in _unpartitioned(state):
            (zero / name).mkdir()
            for key, tensor in tensors.items():
                _save(zero / name / f"{key}.pt", tensor)
                done()
    else:
        _convert_with_deepspeed(source, target, done)
        _reshape(zero, state, done)
    step = summary.optimizer["updates"]
    for parameter in zero.iterdir():
        if parameter.is_dir():
            torch.save(torch.tensor(float(step)), parameter / "step.pt")
            done()
    # Each loader takes its hyper-parameters from the run, its loss scale from our own state: none of them travels in
    # here.
    groups: list[dict[str, Any]] = [{} for _ in range(summary.optimizer["groups"])]
    torch.save(
        {
            "ds_version": state["ds_version"],
            "param_groups": groups,
            "optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": groups},
        },
        zero / "optimizer_state.pt",
    )
    common = {key: value for key, value in state.items() if key not in ("module", "optimizer")}
    for name in MODEL_FILES:
        torch.save(common | {"module": {}, "optimizer": None}, target / name)


def _convert_with_deepspeed(source: Path, target: Path, done: Beat) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: one that was forked from a process with threads can hang
        num_merge_workers=1,
        keep_temp_folder=True,  # removed below: it has a file for every parameter, moment and process
        strict=True,
        inject_missing_state=False,
    )
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with quiet[0], quiet[1], _followed(ds_to_universal, "_save_checkpoint", done):
        ds_to_universal.main(arguments)
    remove_folder(target / "tmp", done)


@contextmanager
def _followed(module: Any, name: str, done: Beat) -> Iterator[None]:
    """Call `done` after each call of a module's function."""
    real = getattr(module, name)

    def followed(*given: Any) -> None:
        real(*given)
        done()

    setattr(module, name, followed)
    try:
        yield
    finally:
        setattr(module, name, real)


def _save(file: Path, tensor: torch.Tensor) -> None:
    # A clone, since a view would be written with all of the storage that it looks into.
    torch.save({"cat_dim": 0, "param": tensor.detach().clone()}, file)


def _shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    """Return the shape of every parameter; stage 3 has a dictionary per group of parameters."""
    shapes = state["param_shapes"]
    return (
        dict(shapes) if isinstance(shapes, dict) else {name: shape for group in shapes for name, shape in group.items()}
    )


def _reshape(zero: Path, state: dict[str, Any], done: Beat) -> None:
    """Give every tensor the parameter's shape, in the layout of stages 1 and 2; stage 3's is a bare vector, padded at
    its end."""
    for name, shape in _shapes(state).items():
        for key in STATES:
            file = zero / name / f"{key}.pt"
            found = torch.load(file, map_location="cpu", weights_only=True)
            tensor = found["param"] if isinstance(found, dict) else found
            _save(file, tensor.flatten()[: math.prod(shape)].reshape(tuple(shape)))
            done()


def _unpartitioned(state: dict[str, Any]) -> Parameters:
    """Yield each parameter of a stage-0 checkpoint with its fp32 weights and moments.

    Three layouts: torch's own optimizer in fp32; DeepSpeed's half-precision ones with one fp32 tensor per parameter, or
    with one flat tensor per group.
    """
    names = state["dialogpt_ds"]["parameter_groups"]
    module, optimizer = state["module"], state["optimizer"]
    if "state" in optimizer:
        number = 0
        for group in names:
            for name in group:
                moments = optimizer["state"].get(number) or _no_moments(module[name])
                yield name, {"fp32": module[name].float(), **{key: moments[key] for key in STATES[1:]}}
                number += 1
        return
    moments_of = optimizer["optimizer_state_dict"]["state"]
    if "fp32_groups" in optimizer:
        number = 0
        for group, masters in zip(names, optimizer["fp32_groups"], strict=True):
            for name, master in zip(group, masters, strict=True):
                yield name, {"fp32": master, **{key: moments_of[number][key] for key in STATES[1:]}}
                number += 1
        return
    for number, (group, flat) in enumerate(zip(names, optimizer["fp32_groups_flat"], strict=True)):
        offset = 0
        for name in group:
            shape = module[name].shape
            place = slice(offset, offset + math.prod(shape))
            offset = place.stop
            sources = {"fp32": flat, **{key: moments_of[number][key] for key in STATES[1:]}}
            yield name, {key: tensor.flatten()[place].reshape(shape) for key, tensor in sources.items()}


def _no_moments(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the moments of a parameter that has not been updated yet."""
    return {key: torch.zeros(weight.shape, dtype=torch.float32) for key in STATES[1:]}


def master_weights(source: Path, summary: Summary) -> dict[str, torch.Tensor]:
    """Return the fp32 weights in a checkpoint of any ZeRO stage by the name of the parameter, from its files alone."""
    if summary.zero_stage == 0:
        state = torch.load(source / MODEL_FILES[0], map_location="cpu", weights_only=False, mmap=True)
        return {name: tensors["fp32"].clone() for name, tensors in _unpartitioned(state)}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(source.parent), tag=source.name))
