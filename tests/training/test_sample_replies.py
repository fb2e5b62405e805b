"""Replies to the sample prompts: at every ZeRO stage, with no effect on training."""

import json
from pathlib import Path

import pytest

from tests.ranks.rank_pool import RankPool
from tests.ranks.rank_tasks import write_deepspeed
from tests.ranks.run_tasks import losses_of, weights_of, whole_run

PROMPTS = ["Does money buy happiness?", "hello EOS hi EOS how are you?"]


def argv(world: tuple[Path, Path], output: Path, config: str, prompts: list[str]) -> list[str]:
    """Return a command line of six steps with two evaluations, with dropout."""
    model, shards = world
    return [
        "--model", str(model), "--train_input_file", str(shards / "train"), "--eval_input_file",
        str(shards / "validation"), "--train_batch_size", "4", "--gradient_accumulation_steps", "2",
        "--num_optim_steps", "6", "--valid_step", "3", "--lr_schedule", "None", "--learning_rate", "1e-3", "--dropout",
        "0.1", "--loader_workers", "0", "--sample_max_new_tokens", "8", "--output_dir", str(output),
        "--deepspeed_config", config, "--sample_prompts", *prompts,
    ]  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_replies_come_with_every_evaluation_and_change_nothing(
    two_ranks: RankPool, small_world: tuple[Path, Path], tmp_path: Path, stage: int
) -> None:
    config = write_deepspeed(tmp_path, stage, "fp32")
    for name, prompts in (("with", PROMPTS), ("without", [""])):
        found = two_ranks.run(whole_run, argv(small_world, tmp_path / name, config, prompts))
        assert [result["code"] for result in found] == [0, 0]
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")
    lines = (tmp_path / "with" / "sample_replies.txt").read_text().splitlines()
    assert [line.partition(" ->")[0] for line in lines] == [
        f"step {step}: {prompt}" for step in (3, 6) for prompt in PROMPTS
    ]
    assert (tmp_path / "without" / "sample_replies.txt").read_text() == ""
    rows = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "seconds_replies" in row] == [3, 6]


def test_the_replies_are_the_same_at_every_stage(
    two_ranks: RankPool, small_world: tuple[Path, Path], tmp_path: Path
) -> None:
    """ZeRO-3's weights are gathered layer by layer, and its ranks go on together."""
    found = {}
    for stage in (1, 3):
        output = tmp_path / str(stage)
        two_ranks.run(whole_run, argv(small_world, output, write_deepspeed(tmp_path, stage, "fp32"), PROMPTS))
        found[stage] = (output / "sample_replies.txt").read_text()
    assert found[1] == found[3]


def test_answers_end_where_the_models_positions_do(
    two_ranks: RankPool, small_world: tuple[Path, Path], tmp_path: Path
) -> None:
    """The model has 128 positions; an answer of 500 tokens would be an error in the middle of a run."""
    words = argv(small_world, tmp_path / "out", write_deepspeed(tmp_path, 3, "fp32"), PROMPTS)
    found = two_ranks.run(whole_run, [*words, "--sample_max_new_tokens", "500", "--num_optim_steps", "3"])
    assert [result["code"] for result in found] == [0, 0]
    assert len((tmp_path / "out" / "sample_replies.txt").read_text().splitlines()) == len(PROMPTS)


def test_a_batch_of_prompts_gives_what_each_alone_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter prompts are padded on the left; the likeliest token is drawn, so that random numbers play no part."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from dialogpt_ds.replies.generate import replies
    from tests.helpers.small_world import byte_tokenizer

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_layer=2, n_embd=32, n_head=2, n_positions=64, eos_token_id=256)
    )
    monkeypatch.setattr(torch, "multinomial", lambda shares, num_samples: shares.argmax(dim=-1, keepdim=True))
    tokenizer, conversations = byte_tokenizer(), [["hi"], ["how are you?", "fine", "and now?"], ["x" * 100]]
    state = torch.random.get_rng_state()
    together = replies(model.train(), tokenizer, conversations, seed=1, max_new_tokens=10)
    assert together == [
        replies(model, tokenizer, [conversation], seed=1, max_new_tokens=10)[0] for conversation in conversations
    ]
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
