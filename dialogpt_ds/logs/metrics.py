"""Every metric that training logs: its name, its unit and what it says. metrics.jsonl, wandb and TensorBoard have the
same."""

from dataclasses import dataclass
from typing import Any, Literal

from dialogpt_ds.order.batches import TURN_GROUPS

Section = Literal["Training", "Throughput", "Stability", "Data", "Evaluation"]
SECTIONS: tuple[Section, ...] = ("Training", "Throughput", "Stability", "Data", "Evaluation")
NOISY = 0.9
"""Smoothing for what jumps from step to step: the weight of what came before in an exponential mean; the raw curve
stays behind it."""


@dataclass(frozen=True)
class Metric:
    """What a metric says, and how the dashboard shows it: panels stand in the order in which they are first named in
    METRICS."""

    section: Section
    unit: str
    meaning: str
    panel: str = ""
    """Title of the panel that it is drawn in, together with what has the same; "" for none."""
    smoothing: float = 0.0
    """0 to 1: weight of what came before; 0 draws the values alone."""
    log: bool = False
    """Whether the panel's axis is logarithmic."""
    why_none: str = ""
    """Why it is in no panel."""


def _turns(prefix: str, section: Section, what: str, panel: str, smoothing: float = 0.0) -> dict[str, Metric]:
    words = ("second turn", "third turn", "fourth turn and later ones")
    return {
        f"{prefix}_{group}": Metric(
            section, "nats", f"{what} over the targets in the {word} of their example", panel, smoothing
        )
        for group, word in zip(TURN_GROUPS, words, strict=True)
    }


STEP = "step"
"""The axis of all others: optimizer steps done, skipped updates included."""
REPLIES_TABLE = "sample_replies"
"""Key of wandb's table with the replies to the sample prompts, logged at every evaluation."""
_PARTS = "Seconds of a step and its parts"
STEP_METRICS: dict[str, Metric] = {
    "loss": Metric("Training", "nats", "sum(weight * nll) / sum(weight) over the global batch", "Loss", NOISY),
    "ppl": Metric("Training", "", "exp(loss)", "Perplexity", NOISY, log=True),
    **_turns("loss", "Training", "the loss", "Loss by turn", NOISY),
    "lr": Metric("Training", "", "learning rate of the step", "Learning rate"),
    "grad_norm": Metric(
        "Stability", "", "2-norm of all gradients before clipping", "Gradient norm before clipping", NOISY, log=True
    ),
    "loss_scale": Metric(
        "Stability", "", "what fp16 multiplies the loss with; 1 in other precisions", "Loss scale (fp16)", log=True
    ),
    "skipped_steps": Metric(
        "Stability",
        "steps",
        "updates skipped so far, their gradients were not finite",
        "Skipped steps and loss spikes so far",
    ),
    "loss_spikes": Metric(
        "Stability",
        "steps",
        "steps so far whose loss lay far above the usual one",
        "Skipped steps and loss spikes so far",
    ),
    "tokens_per_second": Metric(
        "Throughput", "1/s", "tokens of all ranks without padding, by the step's time", "Tokens per second", NOISY
    ),
    "target_tokens_per_second": Metric(
        "Throughput", "1/s", "tokens that are learned, by the step's time", "Tokens per second", NOISY
    ),
    "mfu": Metric(
        "Throughput",
        "share",
        "operations of the model by what the devices can do in the step's time at most",
        "Share of the devices' peak (MFU)",
        NOISY,
    ),
    "data_wait_share": Metric(
        "Throughput",
        "share",
        "part of the step in which a rank waited for its rows",
        "Share of the step spent waiting for data",
        NOISY,
    ),
    "seconds_per_step": Metric("Throughput", "s", "the step, evaluations and saves after it aside", _PARTS, NOISY),
    "seconds_data": Metric("Throughput", "s", "longest that a rank waited for its rows", _PARTS, NOISY),
    "seconds_forward": Metric("Throughput", "s", "forward passes of rank 0", _PARTS, NOISY),
    "seconds_backward": Metric(
        "Throughput", "s", "backward passes of rank 0, gradients' reduction included", _PARTS, NOISY
    ),
    "seconds_optimizer": Metric("Throughput", "s", "update of rank 0", _PARTS, NOISY),
    "gpu_memory_gib": Metric(
        "Throughput",
        "GiB",
        "memory that tensors hold between steps, on the GPU that has most of it (GPUs only)",
        "Memory",
    ),
    "gpu_reserved_gib": Metric(
        "Throughput", "GiB", "memory that PyTorch keeps of a GPU, what is free of it included (GPUs only)", "Memory"
    ),
    "peak_memory_gib": Metric(
        "Throughput", "GiB", "most that a rank has used so far: of its GPU, or of the host's memory on a CPU", "Memory"
    ),
    "host_memory_gib": Metric("Throughput", "GiB", "resident memory of the rank that has most of it", "Memory"),
    "gpu_alloc_retries": Metric(
        "Throughput",
        "",
        "times so far that it was full and had to be given back and asked for anew (GPUs only)",
        "Full memory",
    ),
    "seconds_left": Metric(
        "Throughput", "s", "estimate of the time to the last step, evaluations and saves included", "Time left"
    ),
    "epoch": Metric(
        "Data",
        "epochs",
        "examples trained on, by the examples of an epoch",
        "Epochs, and those of each source of a mixture",
    ),
    "tokens_seen": Metric("Data", "tokens", "trained on so far, without padding", "Tokens trained on"),
    "targets_seen": Metric("Data", "tokens", "learned so far", "Tokens trained on"),
    "rows_seen": Metric("Data", "rows", "trained on so far", "Rows trained on"),
    "padding_share": Metric("Data", "share", "places of the step's rows that hold padding", "Padding", NOISY),
    "skipped_blocks": Metric(
        "Data", "blocks", "skipped so far because they can't be read", "Unreadable blocks that were skipped"
    ),
    "skipped_examples": Metric("Data", "examples", "in those blocks", "Examples in unreadable blocks"),
}
"""A row of each optimizer step."""
SOURCE_EPOCHS = "epoch_source_"
"""With the number of a mixture's source behind it: epochs done of that source, drawn with the epoch."""
EVALUATION_METRICS: dict[str, Metric] = {
    "eval_loss": Metric("Evaluation", "nats", "mean nll over all targets, each counted once", "Evaluation loss"),
    "eval_ppl": Metric("Evaluation", "", "exp(eval_loss)", "Evaluation perplexity", log=True),
    **_turns("eval_loss", "Evaluation", "eval_loss", "Evaluation loss by turn"),
    "eval_targets": Metric(
        "Evaluation", "tokens", "targets that were evaluated on", why_none="the same at every evaluation of a data set"
    ),
    "best_eval_loss": Metric("Evaluation", "nats", "lowest eval_loss so far", "Evaluation loss"),
    "best_eval_ppl": Metric("Evaluation", "", "exp(best_eval_loss)", "Evaluation perplexity", log=True),
    "best_eval_step": Metric(
        "Evaluation", "steps", "step of best_eval_loss", why_none="a step and no curve: a column beside the runs"
    ),
    "seconds_evaluation": Metric("Evaluation", "s", "the evaluation", "Seconds of evaluation and sample replies"),
    "seconds_replies": Metric(
        "Evaluation", "s", "the replies to the sample prompts", "Seconds of evaluation and sample replies"
    ),
}
"""A row of each evaluation."""
SAVE_METRICS: dict[str, Metric] = {
    "seconds_save": Metric("Stability", "s", "the checkpoint", "Seconds of a checkpoint"),
    "save_share": Metric(
        "Stability",
        "share",
        "part of this process's time that saving has taken so far",
        "Share of the time spent saving",
    ),
    "failed_saves": Metric(
        "Stability", "saves", "checkpoints that could not be written so far", "Checkpoints that could not be written"
    ),
}
"""A row of each save."""
METRICS = STEP_METRICS | EVALUATION_METRICS | SAVE_METRICS
"""All of them but `step` and the sources' epochs."""


def metric_of(name: str) -> Metric | None:
    """Return what a name in a log says; None where training logs nothing by it."""
    if name.startswith(SOURCE_EPOCHS) and name.removeprefix(SOURCE_EPOCHS).isdigit():
        return Metric("Data", "epochs", "epochs done of one source of a mixture")
    return METRICS.get(name)


def checked_row(values: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a log without what this run has no value for; a name that is not in METRICS is a mistake in
    this program."""
    unknown = [name for name in values if name != STEP and metric_of(name) is None]
    assert not unknown, unknown
    return {name: value for name, value in values.items() if value is not None}
