"""The command that brings released models: launch/fetch_models.py and dialogpt-fetch."""

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dialogpt_ds.commandline import make_folder, option, parse, run_command
from dialogpt_ds.errors import EXIT_DONE, RunError, UserError
from dialogpt_ds.redaction import without_secrets

RELEASED = {
    **{name: f"microsoft/{name}" for name in ("DialoGPT-small", "DialoGPT-medium", "DialoGPT-large")},
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
}
"""Short names, and where the hub has these models."""
DATA_FOLDER = "DATA_FOLDER"


@dataclass
class FetchArguments:
    """Bring released models here: weights, config and vocabulary, every file checked against the hub's checksum of
    it."""

    models: list[str] = option([], positional=True)
    """DialoGPT-small, DialoGPT-medium, DialoGPT-large, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or any OWNER/NAME of the
    hub."""
    data_folder: str | None = None
    """Each model gets a folder of its name in this one. Default: the environment variable DATA_FOLDER, else
    ./models."""
    revision: str = "main"
    """Branch, tag or commit of the hub's repositories; it is resolved once, and every file comes from that commit."""


def main(argv: list[str] | None = None) -> int:
    """Fetch; returns the exit code."""
    return run_command(lambda: _fetch(argv))


def _fetch(argv: list[str] | None) -> int:
    parsed = parse(FetchArguments, "Bring released models here, checked, and ready for --model.", argv)
    arguments = parsed.arguments
    check_endpoint()
    hub_ids = find_hub_ids(arguments.models)
    data_folder = _data_folder(arguments.data_folder)
    # Only a revision that was asked for is held against a folder that is there.
    revision = arguments.revision if "revision" in parsed.explicit else None
    failures = _fetch_all(hub_ids, revision, data_folder)
    if failures:
        raise _summary(failures, len(hub_ids))
    return EXIT_DONE


def check_endpoint() -> None:
    """Refuse an HF_ENDPOINT that is no address, before huggingface_hub takes it as it is; raises UserError."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good:
        problem = "is no address such as https://HOST: correct it, or unset it"
        raise UserError(f"environment variable HF_ENDPOINT {endpoint!r} {problem}")


def _fetch_all(hub_ids: Sequence[str], revision: str | None, data_folder: Path) -> list[UserError | RunError]:
    """Fetch one model after the other; returns the errors, one for each model that isn't there."""
    from dialogpt_ds.model.fetch import fetch_model, folder_of
    from dialogpt_ds.model.hub import HubUnreachableError

    failures: list[UserError | RunError] = []
    unreachable: HubUnreachableError | None = None
    for hub_id in hub_ids:
        try:
            if unreachable and not folder_of(hub_id, data_folder).exists():
                raise unreachable  # without waiting for the hub once more
            path, release = fetch_model(hub_id, revision, data_folder, _say)
        except (UserError, RunError) as error:
            unreachable = error if isinstance(error, HubUnreachableError) else unreachable
            failures.append(error)
            continue
        size = f"{sum(file.size for file in release.files) / 1e6:,.1f} MB, {release.parameters / 1e6:,.1f} M parameters"
        _say(f"{path}: {size}, {release.hub_id} at commit {release.commit[:12]}, all checksums right")
        _say(f"train with it: deepspeed --num_gpus 8 launch/train.py --model {path} ...")
    return failures


def _say(line: str) -> None:
    print(without_secrets(line), flush=True)


def _summary(failures: Sequence[UserError | RunError], number: int) -> UserError | RunError:
    """Return one error for all; what is said twice, such as that the hub can't be reached, is said once."""
    if number == 1:
        return failures[0]
    kind = RunError if any(isinstance(failure, RunError) for failure in failures) else UserError
    lines = dict.fromkeys(f"  {failure}" for failure in failures)
    return kind("\n".join([f"{len(failures)} of {number} models could not be fetched:", *lines]))


def _data_folder(given: str | None) -> Path:
    from_environment = os.environ.get(DATA_FOLDER)
    folder = Path(given or from_environment or "models").expanduser()
    make_folder(folder, f"environment variable {DATA_FOLDER}" if from_environment and not given else "--data_folder")
    return folder


def find_hub_ids(names: Iterable[str]) -> list[str]:
    """Return the hub's ids of models by their short names or OWNER/NAME, each once.

    Raises:
        UserError: names that are neither, all of them; or two models that would share a folder.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problems: list[str] = []
    hub_ids: dict[str, None] = {}
    for name in names:
        hub_id = RELEASED.get(name, name)
        try:
            validate_repo_id(hub_id)
        except HFValidationError as error:
            problems.append(f"model {name!r} is no OWNER/NAME that the hub allows: {error}")
            continue
        if "/" not in hub_id:
            problems.append(_unknown(name))
        hub_ids[hub_id] = None
    folders = [hub_id.split("/")[-1] for hub_id in hub_ids]
    shared = sorted(hub_id for hub_id in hub_ids if folders.count(hub_id.split("/")[-1]) > 1)
    if shared and not problems:
        problems.append(f"{' and '.join(shared)} would share a folder: give each a --data_folder of its own")
    if problems:
        raise UserError("\n".join(problems))
    return list(hub_ids)


def _unknown(name: str) -> str:
    by_lower = {known.lower(): known for known in RELEASED}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, cutoff=0.5)]
    nearest = f"the nearest names are {', '.join(near)}" if near else f"the names are {', '.join(RELEASED)}"
    return f"model {name!r} is not known: {nearest}; any other model of the hub is given as OWNER/NAME"
