"""A model of 117M's shape, but small, learns 64 conversations by heart, through the whole product: shards, launcher,
export."""

import random
from pathlib import Path

import pytest
import torch

from tests.helpers.small_world import byte_tokenizer
from tests.ranks.launch import deepspeed, run
from tests.ranks.rank_tasks import write_deepspeed

WORDS = ["red", "tea", "no", "why", "sun", "yes", "go", "cat", "big", "old", "run", "sea", "ten", "fly", "hot", "up"]


def conversations(count: int) -> list[tuple[str, str]]:
    """Return prompts, each another one, and replies that don't follow from them."""
    source = random.Random(0)
    prompts: dict[str, str] = {}
    while len(prompts) < count:
        prompts[" ".join(source.choices(WORDS, k=3))] = " ".join(source.choices(WORDS, k=5))
    return list(prompts.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 layers and 12 heads like 117M, 48 wide; and the shards."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from dialogpt_ds.preprocessing.make import ShardArguments, make_shards

    folder = tmp_path_factory.mktemp("overfit")
    torch.manual_seed(0)
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 48, "n_positions": 64, "vocab_size": 257}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=256, eos_token_id=256)).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    lines = [f"{prompt}\t{reply}" for prompt, reply in conversations(64)]
    (folder / "data.tsv").write_text("\n".join(lines) + "\n")
    arguments = ShardArguments(
        [str(folder / "data.tsv")],
        output=str(folder / "data"),
        tokenizer=str(folder / "model"),
        max_seq_length=64,
        workers=1,
    )
    assert make_shards(arguments, say=lambda _: None)
    return folder


def test_64_conversations_are_learned_and_said_verbatim(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(
        [
            *deepspeed(2), "--model", str(folder / "model"), "--train_input_file", str(folder / "data"),
            "--eval_input_file", str(folder / "data"), "--deepspeed_config", write_deepspeed(folder, 2, "fp32"),
            "--output_dir", str(folder / "out"), "--train_batch_size", "16", "--gradient_accumulation_steps", "1",
            "--valid_batch_size", "16", "--num_optim_steps", "260", "--valid_step", "1000", "--lr_schedule", "cosine",
            "--learning_rate", "4e-3", "--warmup_steps", "20",
        ]
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    loss = float((folder / "out" / "eval_log.txt").read_text().splitlines()[-1].split(",")[3])
    assert loss < 0.1
    model = AutoModelForCausalLM.from_pretrained(folder / "out" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "model")
    for prompt, reply in conversations(64):
        ids = torch.tensor([[*tokenizer(prompt).input_ids, tokenizer.eos_token_id]])
        said = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)[
            0, ids.shape[1] :
        ]
        assert tokenizer.decode(said[:-1]) == reply
        assert said[-1] == tokenizer.eos_token_id
