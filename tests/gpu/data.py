"""Made-up conversations as shards with GPT-2's tokenizer: rows of 64 tokens with a validation part, and rows of 512."""

import random
import subprocess
import sys
from pathlib import Path

from tests.gpu.common import ON_GPU, ROOT, shards, work

TEXT = (
    "the of to and in is it you that he was for on are with as they be at one have this from or had by hot but some "
    "what there we can out other were all your when up use word how said an each she which do their time if will way "
    "about many then them would write"
)
WORDS = TEXT.split()


def write_conversations(path: Path, count: int) -> Path:
    """Write weighted conversations in DialoGPT's format, of two to five turns."""
    drawn = random.Random(0)
    lines = []
    for _ in range(count):
        turns = [" ".join(drawn.choices(WORDS, k=drawn.randint(1, 25))) for _ in range(drawn.randint(2, 5))]
        weighted = [f"{drawn.choice(['1.0', '1.0', '0.0', '0.5'])} {turn}" for turn in turns[:-1]]
        lines.append(" EOS ".join(weighted) + f"\t1.0 {turns[-1]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make(name: str, count: int, row_length: int, *options: str) -> None:
    """Make a folder of shards."""
    work().joinpath("data").mkdir(exist_ok=True)
    source = write_conversations(work() / "data" / f"{name}.tsv", count)
    command = [
        sys.executable,
        str(ROOT / "preprocess" / "make_shards.py"),
        "--input",
        str(source),
        "--output",
        str(shards(name)),
    ]
    subprocess.run([*command, "--max_seq_length", str(row_length), "--workers", "1", *options], check=True, timeout=120)


if __name__ == "__main__":
    make("short", 600, 64, "--validation_fraction", "0.05")
    make("long", 6_000 if ON_GPU else 400, 512 if ON_GPU else 128)
