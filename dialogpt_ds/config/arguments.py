"""The training command line: DialoGPT's arguments under their own names and defaults, and ours."""

from dataclasses import dataclass
from typing import Literal

from dialogpt_ds.commandline import option
from dialogpt_ds.config.schedule import ScheduleName

Attention = Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"]
"""Implementations of attention; auto: varlen where device, precision and model have it, else what transformers
takes."""
Link = Literal["auto", "nvlink", "pcie", "100gbe"]
"""Between the GPUs of a dry run."""
SAMPLE_PROMPTS = ("Does money buy happiness?", "How are you?", "What did you do last weekend?", "I just got a new job!")


@dataclass
class TrainingArguments:
    """Train a dialogue response model with DeepSpeed."""

    # The model
    model_name_or_path: str = option("117M", "--model")
    """117M, 345M, 762M, small or tiny (random weights), a local Hugging Face folder, a hub id, or DialoGPT's .pkl
    file."""
    init_checkpoint: str = ""
    """Local Hugging Face folder or .pkl file whose weights are loaded into the model."""
    dropout: float = 0.0
    """Dropout probability everywhere in the model; DialoGPT trained without."""
    no_token_id: bool = True
    """False feeds each token's turn number as its token type, as DialoGPT could."""
    attention: Attention = "auto"
    """Implementation of attention: auto takes the fastest that is right: varlen, PyTorch's FlashAttention for the
    examples of packed rows (compute capability 8.0, fp16 or bf16, no dropout), else sdpa; eager is transformers' plain
    one, flash_attention_2 needs the package flash-attn."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, about a third more
    computing."""
    chunked_head: bool = False
    """Compute the targets' logits piece by piece, and again for the backward pass: less memory, more computing."""
    torch_compile: bool = False
    """Compile the model with torch.compile; the first steps take a minute or more."""

    # Data
    train_input_file: str | list[str] = ""
    """Shard directory to train on (preprocess/make_shards.py writes them), local or remote (https://, s3://, gs://,
    hf://, pipe:COMMAND {}), or several with weights, 3:DIR_A,1:DIR_B: three rows of DIR_A for each of DIR_B."""
    eval_input_file: str = ""
    """Shard directory to evaluate on, or a DialoGPT TSV: its training format, or a source and its references per
    line."""
    normalize_data: bool = True
    """Make runs of white space in an evaluation TSV one space, as DialoGPT did; shards are taken as they are."""
    max_seq_length: int = 128
    """Tokens of a row. Not given: the limit that the shards were made with; longer is allowed, shorter is not."""
    packing: bool = True
    """Several examples share a row, unseen by each other; False puts each in a row of its own, for comparison."""
    loader_workers: int = 1
    """Processes per rank that prepare batches ahead of the training step; 0 does it in the rank itself."""
    on_bad_block: Literal["stop", "skip"] = "stop"
    """Block of examples that can't be read in mid-training: stop all ranks, or leave it out on all ranks and count
    it."""
    cache_dir: str = "~/.cache/dialogpt_ds"
    """Folder on each node for remote shards."""
    cache_gb: float = 50.0
    """Gigabytes of remote shards kept there; those used longest ago are deleted."""
    seed: int = 42
    """Seed of the order of the data, of random weights, and of dropout."""

    # Optimisation
    train_batch_size: int = 4
    """Rows per GPU and optimizer step; divided by gradient_accumulation_steps into micro-batches."""
    valid_batch_size: int = option(4, "--eval_batch_size")
    """Rows per GPU of one evaluation batch; the result does not depend on it."""
    gradient_accumulation_steps: int = 2
    """Micro-batches per GPU and optimizer step."""
    learning_rate: float = 1e-5
    """Scale of the schedule; noam multiplies it with 1e4 * d**-0.5 as DialoGPT did, the start-up table shows the
    peak."""
    lr_schedule: ScheduleName = "noam"
    """noam, noamwd, BERT, None (constant), or cosine."""
    warmup_steps: int = 16_000
    """Steps of rising rate (noam, noamwd, cosine)."""
    warmup_proportion: float = 0.1
    """Share of all steps with rising rate (BERT)."""
    num_optim_steps: int = 1_000_000
    """Optimizer steps of the whole run."""
    fp16: bool = True
    """Half precision with loss scaling; where a DeepSpeed JSON names a precision, that holds."""
    loss_scale: float = 0
    """Fixed fp16 loss scale; 0 adapts it."""
    deterministic: bool = False
    """Compute on a GPU with kernels that give the same bits each time (some of attention's are slower); a CPU does so
    without."""
    max_skipped_steps: int = 20
    """Updates in a row that may be skipped for gradients that are not finite; one more ends the run (fp16: at least as
    many as the loss scale needs to come down from where it starts)."""
    deepspeed_config: str = option("", "--deepspeed")
    """DeepSpeed JSON, see ds_configs/; without it ZeRO stage 1 in the precision that fp16 says."""

    # Evaluation, saving, resuming
    valid_step: int = 10_000
    """Optimizer steps between evaluations; one more comes after the last step."""
    skip_eval: bool = False
    """Never evaluate."""
    sample_prompts: list[str] = option(list(SAMPLE_PROMPTS))
    """Prompts that the model answers at every evaluation, turns separated by EOS as in DialoGPT's files; "" for
    none."""
    sample_max_new_tokens: int = 40
    """Longest answer to a sample prompt (tokens)."""
    save_step: int | None = None
    """Optimizer steps between checkpoints; not given: valid_step."""
    save_minutes: float = 0.0
    """Most minutes between checkpoints, whatever save_step says; 0: no such limit."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept; the best one is kept besides."""
    resume: Literal["auto", "must", "never"] = "auto"
    """Go on from output_dir's last checkpoint if there is one, insist on one, or refuse a directory that has one."""
    continue_from: int = 0
    """Go on from the checkpoint of this optimizer step instead of the last one; later ones are renamed to
    left-step-..."""
    changed_order: Literal["stop", "restart"] = "stop"
    """Where a checkpoint was trained on other data, or with another seed, row length or packing: stop, or go on with
    its weights and optimizer and begin the new order of rows at its first row."""
    hang_timeout: float = 1_800.0
    """Seconds without any progress after which all ranks write down where they stand and the run ends; 0: never."""
    contact_timeout: float = 90.0
    """Seconds without an answer from another host after which it counts as lost and the run ends; 0: only hang_timeout
    notices."""

    # Output
    output_dir: str = "models/output_model"
    """Folder for logs, checkpoints and the exported model."""
    log_dir: str = ""
    """Folder for train_log.txt, eval_log.txt, metrics.jsonl and sample_replies.txt; not given: output_dir."""
    pbar: bool = True
    """Show progress on the terminal."""
    wandb_project: str = "dialogpt-ds"
    """wandb project."""
    wandb_entity: str = ""
    """wandb team or user; not given: the key's own."""
    wandb_run_name: str = ""
    """wandb run name; not given: output_dir's name."""
    wandb_tags: list[str] = option([])
    """wandb tags."""
    wandb_group: str = ""
    """wandb group, for runs that belong together."""
    wandb_job_type: str = "train"
    """wandb job type."""
    wandb_artifacts: bool = False
    """Give wandb the exported model and the table of evaluations as artifacts when the run is done."""
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: as WANDB_MODE says, else online with a key and offline without."""
    tensorboard: bool = False
    """Write TensorBoard's event files into log_dir/tensorboard, too; needs the package tensorboard."""
    verbose: bool = False
    """Show what DeepSpeed, transformers and torch have to say."""
    print_config: bool = False
    """Print the configuration that would run, and stop."""
    plot_schedule: str = ""
    """Picture (.png or .svg) of the learning rate over the run to write, and stop."""
    dry_run: bool = False
    """Build everything in one process, say what the run would need, take two steps, and stop; nothing is written. With
    --expect_world_size N the figures are those of N processes."""
    gpu: str = ""
    """With --dry_run: model how fast the run would be on such GPUs, and whether it fits: H100, H200, A100-40, A100-80,
    V100, T4, L4, RTX 3090, RTX 4090. Modelled from data sheets and published figures, not measured."""
    link: Link = "auto"
    """With --gpu: the slowest link between them; auto: 100gbe (Ethernet of 100 Gbit/s) between hosts, else the GPU's
    own."""

    # Launching
    expect_world_size: int | None = None
    """Stop unless this many processes run: a mistyped host file must not end in a small local run."""
    local_rank: int = -1
    """Set by launchers; LOCAL_RANK in the environment says the same."""
