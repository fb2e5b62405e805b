"""Preprocessing end to end: MB/s and tokens/s beside the raw encoder, and beside a map of HF datasets' kind with a fast
tokenizer.

    python -m tests.benchmarks.preprocess [--megabytes 100] [--runs 3]

The text is chitchat-dataset's conversations, repeated with a word of each changed, as DialoGPT TSV. MB are of the TSV,
10**6 bytes.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dialogpt_ds.conversations.formats.dialogpt_tsv import SEPARATOR
from dialogpt_ds.conversations.inputs import open_inputs
from dialogpt_ds.tokenization import Encode, find_tokenizer, make_encoder


def write_text(path: Path, megabytes: int) -> int:
    """Write at least so much text as DialoGPT TSV without weights; returns its bytes."""
    (source,) = open_inputs([], "chitchat", "auto")
    chats = [[" ".join(turn.split()) for turn in record.content] for record in source.records()]
    written, round_ = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            for number, turns in enumerate(chats):
                if len(turns) < 2:
                    continue
                varied = [f"{turn} {round_ * 7919 + number}" if round_ else turn for turn in turns]
                written += file.write(SEPARATOR.join(varied[:-1]) + "\t" + varied[-1] + "\n")
            round_ += 1
    return path.stat().st_size


def turns_of(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [turn for line in file for turn in line.rstrip("\n").replace("\t", SEPARATOR).split(SEPARATOR)]


def raw_encoder(encode: Encode, turns: list[str]) -> int:
    """Encode all turns in one process and keep nothing: the ceiling. Neither reading nor starting up is in it."""
    return sum(len(encode(turn)) for turn in turns)


_hf = None


def _map_batch(lines: list[str]) -> int:
    """What a datasets.map function with batched=True does: tokenise a batch of texts with the fast tokenizer."""
    return sum(map(len, _hf(lines, add_special_tokens=False).input_ids))  # type: ignore[misc]


def hugging_face_map(path: Path, workers: int) -> int:
    """Batches of 1,000 texts over processes, as Dataset.map(batched=True, num_proc=n) does; writing Arrow files is left
    out."""
    global _hf
    _hf = find_tokenizer("gpt2")
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip("\n").replace("\t", "<|endoftext|>").replace(SEPARATOR, "<|endoftext|>") for line in file]
    batches = [lines[start : start + 1_000] for start in range(0, len(lines), 1_000)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return sum(pool.imap(_map_batch, batches))


def ours(path: Path, folder: Path, workers: int) -> dict[str, float]:
    """Run the command; returns its report."""
    command = [sys.executable, "preprocess/make_shards.py", "--input", str(path), "--output", str(folder), "--targets",
               "all", "--workers", str(workers)]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "report.json").read_text())


def timed(work: Callable[[], object]) -> tuple[float, object]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "text.tsv")
        size = write_text(path, arguments.megabytes)
        turns = turns_of(path)
        encode = make_encoder(find_tokenizer("gpt2"))
        short = Path(name, "short.tsv")
        short.write_text("a\tb\n")
        starting, _ = timed(lambda: ours(short, Path(name, "short"), 1))
        seconds: dict[str, list[float]] = {}
        tokens = memory = 0.0
        for run in range(arguments.runs):
            took, found = timed(lambda: raw_encoder(encode, turns))
            seconds.setdefault("raw encoder, one process", []).append(took)
            tokens = float(found)  # type: ignore[arg-type]
            for workers in (1, 2):
                took, report = timed(
                    lambda workers=workers, run=run: ours(path, Path(name, f"{run}-{workers}"), workers)
                )  # type: ignore[misc]
                seconds.setdefault(f"make_shards.py, --workers {workers}", []).append(took)
                memory = max(memory, report["peak_memory_bytes"])  # type: ignore[index]
            took, _ = timed(lambda: hugging_face_map(path, 2))
            seconds.setdefault("map with HF's fast tokenizer, 2 processes", []).append(took)
    print(
        f"{size / 1e6:,.0f} MB, {len(turns):,} turns, {tokens:,.0f} tokens; peak memory of make_shards.py "
        f"{memory / 1e6:,.0f} MB"
    )
    base = statistics.median(seconds["raw encoder, one process"])
    print(f"starting make_shards.py takes {starting:.1f} s (a file of one line)")
    columns = f"{'seconds':>9}{'MB/s':>8}{'M tokens/s':>12}{'of the raw encoder':>20}{'start aside':>13}"
    print(f"{'median of ' + str(arguments.runs) + ' runs':<44}{columns}")
    for label, values in seconds.items():
        took = statistics.median(values)
        aside = f"{base / (took - starting):>13.2f}" if "make_shards" in label else ""
        print(
            f"{label:<44}{took:>9.1f}{size / took / 1e6:>8.2f}{tokens / took / 1e6:>12.2f}{base / took:>20.2f}{aside}"
        )
    one, two = (statistics.median(seconds[f"make_shards.py, --workers {n}"]) for n in (1, 2))
    print(f"efficiency of 2 workers: {one / two / 2:.2f}; start aside {(one - starting) / (two - starting) / 2:.2f}")


if __name__ == "__main__":
    main()
