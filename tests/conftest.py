"""Shared ground of the tests: their own environment, and small shard directories made once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REDDIT = ROOT.parent / "shared" / "data" / "reddit_t1000.tsv"
"""1,000 real conversations in DialoGPT's format, where they are at hand beside the checkout."""

# The tests decide about their environment, whatever the caller's is.
os.environ.update(
    WANDB_MODE="offline", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"
)
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_NETWORKS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "DEEPSPEED_TIMEOUT", "DS_ENV_FILE", "PDSH_SSH_ARGS_APPEND")
for name in (*OF_LAUNCHERS, *OF_NETWORKS, "WANDB_API_KEY"):
    os.environ.pop(name, None)
for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_"))]:
    del os.environ[name]
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # In the background of a script it is ignored, and what is started here would inherit that and hear of no Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])


BUILD_SECONDS = 600
STARTERS_OF_RANKS = ("tests.ranks.launch", "tests.hosts.two_hosts")
BUILD = """
from dialogpt_ds.distributed.world import World, prepare_environment
prepare_environment(World(0, 1, 0))
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load()
"""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the operation that ranks load before the first test: some wait by the clock for ranks, which should not be
    building then."""
    from dialogpt_ds.launching.needed_ops import SHM_OP
    from dialogpt_ds.launching.op_folder import is_built, op_folder

    if session.config.option.collectonly or not any(has_ranks(item) for item in session.items):
        return
    if not is_built(SHM_OP, op_folder()):
        subprocess.run([sys.executable, "-c", BUILD], stdout=subprocess.DEVNULL, timeout=BUILD_SECONDS, cwd=ROOT)


def has_ranks(item: pytest.Item) -> bool:
    """Return whether a test has processes of its own that are ranks, as far as its fixtures and its module's imports
    show."""
    names = vars(item.module).values() if isinstance(item, pytest.Function) else ()
    starts = any(getattr(value, "__module__", None) in STARTERS_OF_RANKS for value in names)
    return starts or not {"one_rank", "two_ranks"}.isdisjoint(getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def reddit() -> Path:
    """The real conversations; skips the test where they aren't."""
    if not REDDIT.is_file():
        pytest.skip(f"{REDDIT.name} is not beside this checkout")
    return REDDIT


def write_tsv(path: Path, count: int, seed: int = 0) -> Path:
    """Write `count` weighted conversations of made-up words with lengths like real ones'."""
    import random

    random.seed(seed)
    words = [
        "the",
        "of",
        "to",
        "and",
        "in",
        "is",
        "it",
        "you",
        "that",
        "he",
        "was",
        "for",
        "on",
        "are",
        "with",
        "as",
        "they",
        "be",
    ]
    lines = []
    for _ in range(count):
        turns = [" ".join(random.choices(words, k=random.randint(1, 25))) for _ in range(random.randint(2, 5))]
        weights = [random.choice(["1.0", "1.0", "0.0", "0.5"]) for _ in turns]
        weights[-1] = "1.0"
        weighted = [f"{weight} {turn}" for weight, turn in zip(weights, turns, strict=True)]
        lines.append(" EOS ".join(weighted[:-1]) + "\t" + weighted[-1])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard directory of 300 made-up conversations, limit 64 tokens."""
    from dialogpt_ds.preprocessing.make import ShardArguments, make_shards

    folder = tmp_path_factory.mktemp("shards")
    source = write_tsv(folder / "train.tsv", 300)
    make_shards(
        ShardArguments([str(source)], output=str(folder / "data"), max_seq_length=64, workers=1), say=lambda _: None
    )
    return folder / "data"


@pytest.fixture(scope="session")
def two_ranks():
    """Two gloo ranks that stay up for the whole session."""
    from tests.ranks.rank_pool import RankPool

    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank():
    """One rank that stays up for the whole session, for what must happen at another world size than `two_ranks`."""
    from tests.ranks.rank_pool import RankPool

    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A very small model and shards for it: (model folder, folder with train and validation)."""
    from tests.helpers.small_world import make_small_world

    return make_small_world(tmp_path_factory.mktemp("small"))
