"""GPT-2's activation is one kernel in training, keeps its name in the export, and is right in fp16."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dialogpt_ds.model.activation import fuse_activations
from dialogpt_ds.model.load import build_model, find_model

SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 300}


def activations_of(model: torch.nn.Module) -> set[str]:
    return {repr(layer.mlp.act) for layer in model.transformer.h}  # type: ignore[attr-defined, union-attr]


def models(folder: Path) -> dict[str, torch.nn.Module]:
    """Return models from everywhere that they can come from."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SMALL))
    model.save_pretrained(folder / "hf")
    weights = {f"transformer.{name}": tensor for name, tensor in model.transformer.state_dict().items()}
    torch.save(weights, folder / "dialogpt.pkl")
    found = {name: build_model(find_model(str(folder / name), 0.0, 0, 300), None) for name in ("hf", "dialogpt.pkl")}
    return found | {"preset": build_model(find_model("tiny", 0.0, 0, 300), None)}


def test_every_source_of_a_gpt2_trains_with_one_kernel_and_is_described_by_its_name(tmp_path: Path) -> None:
    for name, model in models(tmp_path).items():
        assert activations_of(model) == {"GELU(approximate='tanh')"}, name
        assert model.config.activation_function == "gelu_new", "what the export says, which other tools read"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert activations_of(again) == {"NewGELUActivation()"}, "nobody else's model is touched"


def test_it_is_the_same_function() -> None:
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**SMALL)).double().eval()
    ids = torch.randint(300, (2, 20))
    expected = theirs(ids).logits
    assert fuse_activations(theirs) == 2
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("large", [148.0, 200.0, 30_000.0])
def test_large_activations_have_gradients_in_fp16(large: float) -> None:
    """transformers' own formula has 3 * x**2 in its gradient, which fp16 can't hold from 148 on."""
    model = GPT2LMHeadModel(GPT2Config(**SMALL))
    fuse_activations(model)
    states = torch.tensor([large, -large], dtype=torch.float16, requires_grad=True)
    model.transformer.h[0].mlp.act(states).sum().backward()
    assert states.grad is not None
    assert states.grad.tolist() == [1.0, 0.0]
