"""The head and the loss: logits at every position, at target positions alone, and piece by piece.

    python -m tests.benchmarks.loss --tsv ../shared/data/reddit_t1000.tsv --rows 8 --length 128

Forward and backward of a whole model on the same packed rows, each way in a process of its own, in turn, several times;
medians. "Kept" is what the forward pass keeps for the backward pass, weights aside; the peak is that of the process (of
the GPU where there is one).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time

from tests.benchmarks.train import make_shards, prepare, run_measured, synchronize, usual_precision

WAYS = ("every position", "targets", "targets, piece by piece", "torch's linear_cross_entropy, chunked")
REPEATS = 4


def main() -> None:
    """Run the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tsv", required=True, help="conversations in DialoGPT's format")
    parser.add_argument("--model", default="117M")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or usual_precision()
    if arguments.worker:
        print(json.dumps(measure(arguments)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Run all ways in turn and print a table."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        make_shards(arguments.tsv, f"{folder}/shards", arguments.length)
        for _ in range(arguments.rounds):
            for way in WAYS:
                command = [
                    sys.executable,
                    "-m",
                    "tests.benchmarks.loss",
                    "--tsv",
                    arguments.tsv,
                    "--worker",
                    way,
                    "--shards",
                ]
                command += [f"{folder}/shards", "--model", arguments.model, "--length", str(arguments.length)]
                command += ["--rows", str(arguments.rows), "--precision", arguments.precision]
                output, peak = run_measured(command)
                said = json.loads(output.strip().splitlines()[-1])
                found[way].append({"peak": peak} | said)
    print(
        f"{arguments.model}, {arguments.rows} rows of {arguments.length}, {arguments.precision}, "
        f"{found['targets'][0]['target_share']:.0%} of the tokens are targets, {arguments.rounds} x {REPEATS} passes"
    )
    print(f"{'logits':<40} {'tokens/s':>9} {'kept GiB':>9} {'peak GiB':>9}")
    for way, several in found.items():
        middle = {
            name: statistics.median(one[name] for one in several) for name in ("tokens_per_second", "kept", "peak")
        }
        print(f"{way:<40} {middle['tokens_per_second']:>9,.1f} {middle['kept']:>9.2f} {middle['peak']:>9.2f}")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one way in this process."""
    import torch
    from torch.nn import functional

    from dialogpt_ds.model.loss import TargetLoss, to_tensors
    from dialogpt_ds.model.saved_bytes import activations_measured
    from dialogpt_ds.order.batches import IGNORED_LABEL, RankSlice, rank_step
    from dialogpt_ds.order.mixture import MixturePosition

    ground = prepare(arguments.shards, arguments.model, arguments.length, arguments.precision)
    device, model = ground.device, ground.model.to(ground.device, ground.dtype)
    batch = ground.stream.batch(MixturePosition.start(), arguments.rows)
    step = rank_step(batch, RankSlice(0, 1, arguments.rows, 1), arguments.length, ground.eos)
    tensors = to_tensors(step.micro_batches[0], device)
    loss_of = TargetLoss(model, chunked_head=arguments.worker == WAYS[2])
    body = {"input_ids": tensors["input_ids"], "position_ids": tensors["position_ids"], "use_cache": False}

    def loss() -> torch.Tensor:
        if arguments.worker in WAYS[1:3]:
            return loss_of(**tensors)[0]
        if arguments.worker == WAYS[0]:
            logits = model(**body).logits.flatten(0, 1).float()
            labels = torch.full((len(logits),), IGNORED_LABEL, device=device)
            real = tensors["labels"] >= 0
            labels[tensors["target_places"][real]] = tensors["labels"][real]
            return functional.cross_entropy(logits, labels, reduction="sum")
        hidden = model.base_model(**body).last_hidden_state.flatten(0, 1)[tensors["target_places"]]
        options = torch.nn.LinearCrossEntropyOptions()
        return functional.linear_cross_entropy(
            hidden, model.lm_head.weight, tensors["labels"], reduction="none", options=options
        ).sum()

    with activations_measured(model) as saved:
        loss().backward()
    seconds = []
    for _ in range(REPEATS):
        model.zero_grad()
        synchronize(device)
        started = time.perf_counter()
        loss().backward()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {
        "tokens_per_second": batch.rows.num_tokens / statistics.median(seconds),
        "kept": saved.total / 2**30,
        "target_share": batch.rows.num_targets / batch.rows.num_tokens,
    } | ({"peak": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {})


if __name__ == "__main__":
    main()
