"""Fetched models: whole or not there, checked against the hub's sums, fetched once, and never over somebody's own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from dialogpt_ds.errors import UserError
from dialogpt_ds.files import sha256_of_file
from dialogpt_ds.model.hub import RECORD, HubFile, wanted_files
from tests.conftest import ROOT
from tests.helpers.small_world import byte_tokenizer
from tests.servers.hub_server import TOKEN, HubServer

SMALL = "microsoft/DialoGPT-small"
WEIGHTS = "model.safetensors"
PARAMETERS = 257 * 16 + 1_024 * 16 + (16 * 48 + 48 + 16 * 16 + 16 + 16 * 64 + 64 + 64 * 16 + 16 + 4 * 16) + 2 * 16
"""Embedding, positions, one layer (attention, its projection, the MLP's two, two norms), the last norm; the head is
tied."""
COMMAND = str(ROOT / "launch" / "fetch_models.py")
IMPATIENT = (
    "import runpy, sys, time; from dialogpt_ds.model import hub; hub.LISTING_SECONDS = 2.0; "
    "sleep = time.sleep; time.sleep = lambda seconds: sleep(seconds / 200); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""The command itself, with pauses (the library's, too) and timeouts that a test can wait for."""


@dataclass
class Command:
    """Runs the command in a folder of its own, with nothing of the caller's settings for the hub."""

    folder: Path
    endpoint: str
    prefix: tuple[str, ...] = ()

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def environment(self, **more: str) -> dict[str, str]:
        foreign = ("HF_", "HUGGING", "DATA_FOLDER")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and not k.lower().endswith("_proxy")}
        paths = {"HOME": str(self.folder), "HF_HOME": str(self.folder / "hf_home"), "PYTHONPATH": str(ROOT)}
        return kept | paths | {"HF_ENDPOINT": self.endpoint} | more

    def start(self, *arguments: str, impatient: bool = False, **environment: str) -> subprocess.Popen[str]:
        command = [*self.prefix, sys.executable, *(["-c", IMPATIENT] if impatient else []), COMMAND, *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment(**environment), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: str, impatient: bool = False, **environment: str) -> tuple[int, str, str]:
        """Return the exit code, stdout and stderr."""
        process = self.start(*arguments, impatient=impatient, **environment)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def good(self, *arguments: str, **options: str | bool) -> str:
        """Run it where it has to succeed; returns stdout."""
        code, out, err = self(*arguments, **options)  # type: ignore[arg-type]
        assert (code, err) == (0, ""), out + err
        return out


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository's files: a GPT-2 of one layer, its tokenizer, and files of other frameworks."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("released")
    config = GPT2Config(
        vocab_size=257, n_layer=1, n_embd=16, n_head=2, n_positions=1_024, bos_token_id=256, eos_token_id=256
    )
    GPT2LMHeadModel(config).save_pretrained(str(folder))
    byte_tokenizer().save_pretrained(str(folder))
    for name in ("README.md", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin", "model.onnx", "training.py"):
        (folder / name).write_text("not wanted")
    return folder


@pytest.fixture
def hub(released: Path) -> Iterator[HubServer]:
    server = HubServer()
    server.add(SMALL, released)
    yield server
    server.close()


@pytest.fixture
def fetch(hub: HubServer, tmp_path: Path) -> Command:
    return Command(tmp_path, hub.url)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def changed_copy(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def only_pickle(folder: Path, **options: bool) -> None:
    """Replace the weights by a pytorch_model.bin with what the old ones hold besides: the tied head, and masks of
    attention."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    weights |= {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    torch.save(weights, folder / "pytorch_model.bin", **options)
    (folder / WEIGHTS).unlink()


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def check_loads(folder: Path, released: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True)
    assert not info["missing_keys"]
    weights = load_file(released / WEIGHTS)
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in weights.items())
    assert AutoTokenizer.from_pretrained(str(folder))("hi").input_ids == [104, 105]


def test_a_fetched_model_loads_and_only_what_a_training_needs_was_fetched(
    hub: HubServer, fetch: Command, released: Path
) -> None:
    out = fetch.good("DialoGPT-small")
    path = fetch.models / "DialoGPT-small"
    check_loads(path, released)
    wanted = ["config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"]
    assert files_in(path) == sorted([*wanted, RECORD])
    assert [name for name in hub.fetched() if "/" not in name] == sorted(wanted)
    assert files_in(fetch.models) == ["DialoGPT-small"], "no lock and no unfinished folder is left"
    commit = hub.repos[SMALL].commit
    record = json.loads((path / RECORD).read_text())
    assert record["files"].pop(WEIGHTS) == {
        "size": (released / WEIGHTS).stat().st_size,
        "sha256": sha256_of_file(released / WEIGHTS),
    }
    assert sorted(record.pop("files")) == sorted(set(wanted) - {WEIGHTS})
    host = hub.url.removeprefix("http://")
    assert record == {"hub_id": SMALL, "revision": "main", "commit": commit, "endpoint": host, "parameters": PARAMETERS}
    size = sum((released / name).stat().st_size for name in wanted) / 1e6
    assert out.splitlines() == [
        f"models/DialoGPT-small: fetching 5 files, {size:.1f} MB, of {SMALL} at commit {commit[:12]} from {hub.url}",
        f"models/DialoGPT-small: {size:.1f} MB, 0.0 M parameters, {SMALL} at commit {commit[:12]}, all checksums right",
        "train with it: deepspeed --num_gpus 8 launch/train.py --model models/DialoGPT-small ...",
    ]


@pytest.mark.parametrize("zipped", [False, True], ids=["as before 2020", "zipped"])
def test_a_repository_with_a_pickle_alone(
    hub: HubServer, fetch: Command, released: Path, tmp_path: Path, zipped: bool
) -> None:
    source = changed_copy(
        released, tmp_path / "source", lambda f: only_pickle(f, _use_new_zipfile_serialization=zipped)
    )
    hub.add("someone/pickled", source)
    fetch.good("someone/pickled")
    path = fetch.models / "pickled"
    assert "pytorch_model.bin" in files_in(path)
    assert json.loads((path / RECORD).read_text())["parameters"] == PARAMETERS
    check_loads(path, released)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("it_ran",)


def test_a_pickle_that_would_run_code_is_refused(
    hub: HubServer, fetch: Command, released: Path, tmp_path: Path
) -> None:
    def change(folder: Path) -> None:
        import torch

        torch.save({"weight": torch.ones(2), "more": Hostile()}, folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()

    hub.add("someone/hostile", changed_copy(released, tmp_path / "source", change))
    code, _, err = fetch("someone/hostile")
    assert code == 1
    assert (
        "pytorch_model.bin can't be opened safely (UnpicklingError: Trying to load unsupported GLOBAL posix.mkdir"
        in err
    )
    assert not (fetch.folder / "it_ran").exists()
    assert not (fetch.models / "hostile").exists()


def test_weights_in_several_files_come_with_their_index(
    hub: HubServer, fetch: Command, released: Path, tmp_path: Path
) -> None:
    def change(folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(str(folder))
        (folder / WEIGHTS).unlink()
        model.save_pretrained(str(folder), max_shard_size="40KB")

    source = changed_copy(released, tmp_path / "source", change)
    repo = hub.add("someone/sharded", source)
    fetch.good("someone/sharded")
    parts = sorted(name for name in repo.files if name.startswith("model-"))
    assert len(parts) > 1
    assert set(parts) | {"model.safetensors.index.json"} < set(files_in(fetch.models / "sharded"))
    check_loads(fetch.models / "sharded", released)
    del repo.files[parts[0]]
    code, _, err = fetch("someone/sharded", "--data_folder", "other")
    assert code == 1
    assert f"model.safetensors.index.json names {parts[0]}, which the repository does not have" in err


def test_a_transfer_that_breaks_off_is_taken_up_again(hub: HubServer, fetch: Command, released: Path) -> None:
    hub.cut_after[WEIGHTS] = [30_000, 20_000]
    fetch.good("DialoGPT-small", impatient=True)
    assert len(hub.transfers(WEIGHTS)) == 3
    assert sha256_of_file(fetch.models / "DialoGPT-small" / WEIGHTS) == sha256_of_file(released / WEIGHTS)


def test_what_a_killed_run_left_is_kept_where_it_is_whole_and_never_taken_for_it(
    hub: HubServer, fetch: Command, released: Path
) -> None:
    hub.hold_after[WEIGHTS] = 40_000
    process = fetch.start("DialoGPT-small")
    unfinished = fetch.models / ".unfinished-DialoGPT-small"
    deadline = time.monotonic() + 30
    while not hub.transfers(WEIGHTS) or hub.transfers(WEIGHTS)[0].sent < 40_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    code, _, err = fetch("DialoGPT-small")
    assert (code, err.count("\n")) == (2, 1)
    assert "error: models/DialoGPT-small: another run is fetching it" in err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.release.set()
    assert not (fetch.models / "DialoGPT-small").exists()
    assert list(unfinished.rglob("*.incomplete")), "the run was killed in the middle of a file"
    before = len(hub.asked)
    fetch.good("DialoGPT-small")
    again = {asked.name for asked in hub.asked[before:] if asked.sent and "/" not in asked.name}
    assert again == {WEIGHTS}, "the files that were whole were kept"
    assert files_in(fetch.models) == ["DialoGPT-small"]
    assert sorted(path.name for path in (fetch.models / "DialoGPT-small").rglob("*")) == sorted(
        ["config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", RECORD]
    )
    check_loads(fetch.models / "DialoGPT-small", released)


def test_a_transfer_that_does_not_get_on_ends_and_the_same_command_brings_the_rest(
    hub: HubServer, fetch: Command
) -> None:
    hub.always_cut_after[WEIGHTS] = 50_000
    code, out, err = fetch("DialoGPT-small", impatient=True)
    assert code == 1
    assert err.startswith(f"run failed: {WEIGHTS} of {SMALL} broke off (")
    assert "The files that are whole are kept: the same command brings the others." in err
    assert "; attempt 6 of 6 in " in out
    assert not (fetch.models / "DialoGPT-small").exists()
    assert not list(fetch.models.rglob("*.incomplete"))
    hub.always_cut_after.clear()
    hub.asked.clear()
    fetch.good("DialoGPT-small")
    assert [name for name in hub.fetched() if "/" not in name] == [WEIGHTS]


def test_a_wrong_byte_is_found_and_the_file_fetched_once_more(hub: HubServer, fetch: Command, released: Path) -> None:
    for name in (WEIGHTS, "config.json"):
        hub.flipped[name] = 1
    out = fetch.good("DialoGPT-small")
    assert "config.json: its git blob sha1 is " in out
    assert f"{WEIGHTS}: its sha256 is " in out
    assert [len(hub.transfers(name)) for name in (WEIGHTS, "config.json", "tokenizer.json")] == [2, 2, 1]
    check_loads(fetch.models / "DialoGPT-small", released)


def test_a_file_that_stays_wrong_is_refused(hub: HubServer, fetch: Command, released: Path) -> None:
    hub.flipped[WEIGHTS] = 2
    code, _, err = fetch("DialoGPT-small")
    assert code == 1
    assert err.startswith(
        f"run failed: {WEIGHTS} of {SMALL} is not what the hub says it is, and was deleted: its sha256 is "
    )
    assert f"expected {sha256_of_file(released / WEIGHTS)}" in err
    assert not (fetch.models / "DialoGPT-small").exists()
    assert not list(fetch.models.rglob(f"{WEIGHTS}*"))


def test_a_whole_folder_needs_no_hub_and_of_a_damaged_one_only_the_damage_is_fetched(
    hub: HubServer, fetch: Command, released: Path
) -> None:
    fetch.good("DialoGPT-small")
    path = fetch.models / "DialoGPT-small"
    hub.asked.clear()
    assert fetch.good("DialoGPT-small").startswith("models/DialoGPT-small is complete\n")
    assert not hub.asked
    flip_byte(path / WEIGHTS)
    (path / "tokenizer.json").unlink()
    (path / "notes.txt").write_text("somebody's own")
    out = fetch.good("DialoGPT-small")
    assert f"models/DialoGPT-small/{WEIGHTS} is damaged (its sha256 is " in out
    assert "models/DialoGPT-small/tokenizer.json is damaged (it is missing); it is fetched again" in out
    assert [name for name in hub.fetched() if "/" not in name] == [WEIGHTS, "tokenizer.json"]
    assert (path / "notes.txt").exists()
    assert files_in(fetch.models) == ["DialoGPT-small"]
    check_loads(path, released)
    hub.close()
    assert "is complete" in fetch.good("DialoGPT-small", HF_HUB_OFFLINE="1")
    flip_byte(path / WEIGHTS)
    code, _, err = fetch("DialoGPT-small", HF_HUB_OFFLINE="1")
    assert (code, err.count("HF_HUB_OFFLINE forbids to ask the hub at ")) == (2, 1)


def test_a_folder_of_something_else_is_left_alone(hub: HubServer, fetch: Command, released: Path) -> None:
    own = fetch.models / "DialoGPT-small"
    own.mkdir(parents=True)
    (own / WEIGHTS).write_text("mine")
    code, _, err = fetch("DialoGPT-small")
    assert code == 2
    assert "models/DialoGPT-small is there and was not made by this command (it has no fetched_from.json)" in err
    assert files_in(own) == [WEIGHTS]
    assert (own / WEIGHTS).read_text() == "mine"
    shutil.rmtree(own)
    fetch.good("DialoGPT-small")
    hub.add("other/DialoGPT-small", released)
    code, _, err = fetch("other/DialoGPT-small")
    assert code == 2
    assert f"models/DialoGPT-small holds {SMALL}, and other/DialoGPT-small was asked for" in err
    code, _, err = fetch("DialoGPT-small", "--revision", "v2")
    assert code == 2
    assert f"holds revision main (commit {hub.repos[SMALL].commit}), and --revision v2 was asked for" in err
    fetch.good("DialoGPT-small", "--revision", hub.repos[SMALL].commit)
    (own / RECORD).write_text("{")
    code, _, err = fetch("DialoGPT-small")
    assert code == 2
    assert "models/DialoGPT-small/fetched_from.json can't be read" in err


def test_the_data_folder_is_the_options_or_the_environments(fetch: Command) -> None:
    elsewhere = fetch.folder / "elsewhere"
    fetch.good("DialoGPT-small", DATA_FOLDER=str(elsewhere))
    fetch.good("DialoGPT-small", "--data_folder", "given", DATA_FOLDER=str(elsewhere / "unused"))
    for folder in (elsewhere, fetch.folder / "given"):
        assert (folder / "DialoGPT-small" / WEIGHTS).is_file()
    assert files_in(elsewhere) == ["DialoGPT-small"]
    assert not fetch.models.exists()
    (fetch.folder / "file").write_text("")
    code, _, err = fetch("DialoGPT-small", DATA_FOLDER="file/models")
    assert code == 2
    assert err.startswith("error: environment variable DATA_FOLDER 'file/models' can't be made")


def test_an_unreachable_hub_is_one_message(fetch: Command) -> None:
    with socket.socket() as free:  # bound, and nobody listens
        free.bind(("127.0.0.1", 0))
        fetch.endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        begun = time.monotonic()
        code, out, err = fetch("DialoGPT-small", "gpt2")
        assert time.monotonic() - begun < 30
    assert (code, out) == (2, "")
    assert err.count("can't be reached") == 1, "said once for both"
    assert (
        f"the hub at {fetch.endpoint} can't be reached ([Errno 111] Connection refused): set HF_ENDPOINT to a mirror"
        in err
    )
    fetch.endpoint = "http://no-such-host.invalid"
    code, _, err = fetch("DialoGPT-small")
    assert (code, err.count("\n")) == (2, 1)
    assert "the hub at http://no-such-host.invalid can't be reached (" in err
    fetch.endpoint = "http://host:port"
    code, _, err = fetch("DialoGPT-small")
    assert (code, err.count("environment variable HF_ENDPOINT 'http://host:port' is no address")) == (2, 1)


def test_a_hub_that_is_silent_is_waited_for_once(hub: HubServer, fetch: Command) -> None:
    fetch.good("DialoGPT-small")
    with socket.socket() as silent:  # connections are taken, and never answered
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        fetch.endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code, out, err = fetch("gpt2", "gpt2-medium", "gpt2-large", "DialoGPT-small", impatient=True)
        silent.setblocking(False)
        connections = 0
        with suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                connections += 1
    assert connections <= 2, "one for the first model, and one that huggingface_hub makes for its user agent"
    assert code == 2
    assert out.startswith("models/DialoGPT-small is complete\n")
    assert err.startswith("error: 3 of 4 models could not be fetched:\n")
    assert err.count(f"the hub at {fetch.endpoint} can't be reached (timed out)") == 1


def test_unknown_names_are_told_the_nearest_before_anything_starts(hub: HubServer, fetch: Command) -> None:
    code, _, err = fetch("DialoGPT-smal", "gtp2-xl", "Dialogpt-small", "a/b/c", "DialoGPT-small")
    assert code == 2
    assert "model 'DialoGPT-smal' is not known: the nearest names are DialoGPT-small, DialoGPT-" in err
    assert "model 'gtp2-xl' is not known: the nearest names are gpt2-xl" in err
    assert "model 'Dialogpt-small' is not known: the nearest names are DialoGPT-small" in err
    assert "model 'a/b/c' is no OWNER/NAME" in err
    assert not hub.asked
    assert not fetch.models.exists()
    code, _, err = fetch("gpt2", "someone/gpt2")
    assert (code, "openai-community/gpt2 and someone/gpt2 would share a folder" in err) == (2, True)


def test_what_the_hub_refuses_is_said_and_the_others_are_fetched(
    hub: HubServer, fetch: Command, released: Path
) -> None:
    hub.add("someone/gated", released, gated=True)
    hub.add("someone/weightless", released).files.clear()
    code, out, err = fetch("someone/nothing", "DialoGPT-small", "someone/gated", "someone/weightless")
    assert code == 2
    assert err.startswith("error: 3 of 4 models could not be fetched:\n")
    assert f"someone/nothing: the hub at {hub.url} has no such model, or it is private (it answers 404)" in err
    assert (
        f"someone/gated: the hub at {hub.url} does not give it to you (it answers 401): accept the model's terms" in err
    )
    assert "someone/weightless has no config.json and no weights (model.safetensors or pytorch_model.bin)" in err
    assert "train with it: deepspeed --num_gpus 8 launch/train.py --model models/DialoGPT-small ..." in out
    fetch.good("someone/gated", HF_TOKEN=TOKEN)
    assert [asked.authorization for asked in hub.transfers(WEIGHTS)][-1] is None, "another host does not get the token"
    code, _, err = fetch("DialoGPT-small", "--data_folder", "other", "--revision", "v2")
    assert (code, f"{SMALL} has no branch, tag or commit 'v2'" in err) == (2, True)


def test_the_password_of_a_mirror_is_kept_nowhere(hub: HubServer, fetch: Command) -> None:
    fetch.endpoint = hub.url.replace("http://", "http://reader:a-long-password@")
    hub.failures = [503]
    out = fetch.good("DialoGPT-small", impatient=True)
    code, other, err = fetch("someone/nothing")
    assert code == 2
    assert "a-long-password" not in out + other + err
    kept = [path for path in fetch.models.rglob("*") if path.is_file() and b"a-long-password" in path.read_bytes()]
    assert kept == []


def test_a_hub_that_answers_with_errors_is_asked_again(hub: HubServer, fetch: Command) -> None:
    hub.failures = [503, 429]
    out = fetch.good("DialoGPT-small", impatient=True)
    assert f"{hub.url} answers 503; attempt 2 of 6" in out
    hub.failures = [503] * 6
    code, _, err = fetch("DialoGPT-small", "--data_folder", "other", impatient=True)
    assert code == 1
    assert (
        err == f"run failed: {SMALL}: {hub.url} answers 503. What is here is kept: the same command goes on from it.\n"
    )


def test_space_is_looked_at_before(hub: HubServer, fetch: Command, released: Path) -> None:
    hub.add("someone/big", released, claimed_sizes={WEIGHTS: 10**17})
    code, _, err = fetch("someone/big")
    assert code == 2
    assert err.startswith("error: someone/big needs 100,000,000,")
    assert f"more bytes, and the disk of models has {shutil.disk_usage(fetch.folder).free // 10**9:,}," in err
    assert hub.fetched() == []


def test_a_disk_that_fills_up_is_said_and_what_is_here_kept(hub: HubServer, fetch: Command) -> None:
    """The limit on a file's size makes the kernel refuse the write, as a full disk or a quota does."""
    fetch.prefix = ("bash", "-c", 'ulimit -f 32; exec "$@"', "bash")
    code, _, err = fetch("DialoGPT-small")
    assert (code, err) == (1, "run failed: models/DialoGPT-small can't be written or read: File too large\n")
    fetch.prefix = ()
    hub.asked.clear()
    fetch.good("DialoGPT-small")
    assert [name for name in hub.fetched() if "/" not in name] == [WEIGHTS]


def test_a_bar_is_shown_on_a_terminal_alone(hub: HubServer, fetch: Command) -> None:
    ours, terminal = os.openpty()  # of a size that nobody has set
    command = [sys.executable, COMMAND, "DialoGPT-small"]
    environment = fetch.environment()
    done = subprocess.run(
        command, cwd=fetch.folder, env=environment, stdout=subprocess.PIPE, stderr=terminal, text=True, timeout=60
    )
    os.close(terminal)
    shown = b""
    with suppress(OSError), open(ours, "rb", buffering=0) as file:  # Linux ends a terminal without a writer by an error
        while piece := file.read(4_096):
            shown += piece
    assert done.returncode == 0
    assert b"model.safetensors: 100%|" in shown
    assert "%|" not in done.stdout


def test_the_hubs_own_client_takes_the_test_server_for_a_hub(hub: HubServer, fetch: Command, released: Path) -> None:
    """Else the other tests would show that two things of our own fit each other."""
    code = f"from huggingface_hub import snapshot_download; print(snapshot_download('{SMALL}'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=fetch.environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    snapshot = Path(done.stdout.strip())
    assert files_in(snapshot) == files_in(released)
    assert sha256_of_file(snapshot / WEIGHTS) == sha256_of_file(released / WEIGHTS)


def test_the_sum_of_a_small_file_is_gits(tmp_path: Path) -> None:
    file = tmp_path / "hello"
    file.write_text("hello\n")
    assert HubFile("hello", 6, "git blob sha1", "ce013625030ba8dba906f756967f9e9ca394464a").difference(file) is None
    file.write_text("jello\n")
    assert "expected ce0136250" in str(
        HubFile("hello", 6, "git blob sha1", "ce013625030ba8dba906f756967f9e9ca394464a").difference(file)
    )


def test_weights_of_one_kind_are_chosen() -> None:
    others = ["config.json", "tf_model.h5", "onnx/decoder_model.onnx", "rust_model.ot", "README.md", "vocab.json"]
    parts = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    index = "pytorch_model.bin.index.json"
    assert wanted_files("a/b", [*others, "pytorch_model.bin", WEIGHTS]) == ["config.json", "vocab.json", WEIGHTS]
    assert wanted_files("a/b", [*others, "pytorch_model.bin"]) == ["config.json", "vocab.json", "pytorch_model.bin"]
    assert wanted_files("a/b", [*others, *parts, index]) == ["config.json", "vocab.json", index, *parts]
    with pytest.raises(UserError, match=r"a/b has no weights \(model.safetensors or pytorch_model.bin\), so"):
        wanted_files("a/b", others)
