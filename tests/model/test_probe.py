"""What a model is asked before it trains, and causal models of other families on the way."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dialogpt_ds.errors import UserError
from dialogpt_ds.model.load import find_model
from dialogpt_ds.model.loss import TargetLoss
from dialogpt_ds.model.probe import Wants, check_model, head_is_linear, keeps_examples_apart
from tests.conftest import ROOT
from tests.helpers import rank_tasks
from tests.helpers.hub_server import HubServer
from tests.helpers.rank_pool import RankPool
from tests.helpers.run_tasks import losses_of, whole_run

SmallWorld = tuple[Path, Path]
SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def built(kind: str) -> Any:
    """Return a small model of a family, in fp32."""
    import transformers

    config = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=257, n_layer=2, n_embd=32, n_head=2),
        "llama": lambda: transformers.LlamaConfig(**SHAPE),
        "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
        "bloom": lambda: transformers.BloomConfig(vocab_size=257, hidden_size=32, n_layer=2, n_head=2),
        "mamba": lambda: transformers.MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=4),
    }[kind]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gpt_neox"])
def test_models_with_positions_keep_the_examples_of_a_row_apart(kind: str) -> None:
    model = built(kind)
    assert keeps_examples_apart(model)
    check_model(model, kind, Wants())
    assert model.training, "and are left as they were"


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_models_that_would_mix_examples_are_refused_with_the_way_out(kind: str) -> None:
    model = built(kind)
    with pytest.raises(
        UserError, match=rf"in model '{kind}' \({kind}\) the examples of a row would see each other.*--packing False"
    ):
        check_model(model, kind, Wants())
    check_model(model, kind, Wants(packing=False))
    ids, places = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 2, 3]])
    loss, _ = TargetLoss(model)(ids, places, torch.tensor([1, 2]), torch.tensor([3, 4]), torch.ones(2), torch.tensor([0, 1]))
    assert torch.isfinite(loss)


def test_turn_numbers_need_a_model_that_takes_them() -> None:
    check_model(built("gpt2"), "gpt2", Wants(turn_ids=True))
    with pytest.raises(UserError, match=r"--no_token_id False .* model 'llama' does not take"):
        check_model(built("llama"), "llama", Wants(turn_ids=True))


def test_logits_that_are_capped_are_found_in_a_new_model_too() -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SHAPE, head_dim=16))
    assert model.config.final_logit_softcapping
    assert not head_is_linear(model)
    with pytest.raises(UserError, match=r"--chunked_head: the logits of model 'gemma' .* leave it out"):
        check_model(model, "gemma", Wants(chunked_head=True))
    assert head_is_linear(built("llama"))
    assert head_is_linear(built("gpt2"))


def test_flash_attention_without_a_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match="--attention flash_attention_2: this run is not on a GPU; leave --attention out"):
        find_model("tiny", 0.0, 50_256, 50_257, "flash_attention_2")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_laid_behind_each_other_as_flash_attention_wants_them_give_the_same_loss(attention: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    loss_of = TargetLoss(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation=attention)).eval()
    ids = torch.randint(0, 257, (3, 12))
    places = torch.cat([torch.arange(7), torch.arange(5)]).repeat(3, 1)
    targets = torch.tensor([2, 9, 14, 30])
    inputs = (ids, places, targets, ids.flatten()[targets + 1], torch.ones(4), torch.zeros(4, dtype=torch.int64))
    expected = loss_of(*inputs)[0]
    loss_of.in_one_row = True
    torch.testing.assert_close(loss_of(*inputs)[0], expected)


def test_a_llama_trains_and_exports_like_a_gpt2(two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = SHAPE | {"num_key_value_heads": 1, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=256, eos_token_id=256)).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(small_world[0]).save_pretrained(tmp_path / "llama")
    argv = ["--model", str(tmp_path / "llama"), "--train_input_file", str(small_world[1] / "train"), "--eval_input_file",
            str(small_world[1] / "validation"), "--num_optim_steps", "12", "--valid_step", "6", "--learning_rate", "3e-3",
            "--lr_schedule", "None", "--output_dir", str(tmp_path / "out"),
            "--deepspeed_config", rank_tasks.write_deepspeed(tmp_path, 3, "fp32")]  # fmt: skip
    assert [end["code"] for end in two_ranks.run(whole_run, argv)] == [0, 0]
    losses = losses_of(tmp_path / "out")
    assert losses[-1] < losses[0] - 1.0
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out" / "model").config.model_type == "llama"


@pytest.fixture
def hub(small_world: SmallWorld) -> Iterator[HubServer]:
    server = HubServer()
    server.add("someone/small", small_world[0])
    yield server
    server.close()


def train(folder: Path, endpoint: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the training command with a hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf_home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *options]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_hub_id_is_fetched_and_trained(hub: HubServer, small_world: SmallWorld, tmp_path: Path) -> None:
    options = ["--model", "someone/small", "--train_input_file", str(small_world[1] / "train"), "--skip_eval", "--fp16", "False"]
    done = train(tmp_path, hub.url, *options, "--num_optim_steps", "2", "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_a_hub_id_that_is_not_there_or_a_hub_that_is_not_is_one_clear_message(
    hub: HubServer, small_world: SmallWorld, tmp_path: Path
) -> None:
    options = ["--train_input_file", str(small_world[1] / "train"), "--skip_eval", "--fp16", "False"]
    missing = train(tmp_path, hub.url, "--model", "someone/else", *options)
    unreachable = train(tmp_path, "http://127.0.0.1:9", "--model", "someone/small", *options)
    for done, words in ((missing, "--model 'someone/else' could not be loaded from the hub"), (unreachable, "can't be reached")):
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
