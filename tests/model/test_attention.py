"""Examples of a row are kept apart by a kernel or a mask, whichever is right for the model, and nothing waits for the
device."""

from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
)

from dialogpt_ds.errors import UserError
from dialogpt_ds.model import attention
from dialogpt_ds.model.attention import (
    VARLEN,
    can_be_varlen,
    check_attention,
    example_mask,
    isolation_of,
    set_attention,
)
from dialogpt_ds.model.loss import TargetLoss
from dialogpt_ds.model.probe import keeps_examples_apart

SHAPE = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
"""Examples of 4, 3, 1 and 8 tokens."""
STARTS = torch.tensor([0, 4, 7, 8, 16], dtype=torch.int32)


def gpt2(**more: Any) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257,
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_positions=64,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        **more,
    )
    return GPT2LMHeadModel(config)


def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))


def inputs() -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(257, (2, 8), generator=random)
    places = torch.tensor([0, 2, 4, 9, 13])
    return {
        "input_ids": ids, "position_ids": POSITIONS, "target_places": places, "labels": ids.flatten()[places + 1],
        "weights": torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0]), "turn_groups": torch.tensor([0, 0, 1, 2, 2]),
        "example_starts": STARTS, "longest_example": 8,
    }  # fmt: skip


def loss_and_gradients(loss_of: TargetLoss) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss_of.zero_grad()
    sums = loss_of(**inputs())
    sums.weighted.backward()
    return torch.cat([found.detach().flatten() for found in sums]), {
        n: p.grad.clone() for n, p in loss_of.model.named_parameters()
    }


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama, heads that share keys"])
@pytest.mark.parametrize("way", ["mask", "eager", VARLEN, "varlen, recomputed"])
def test_every_way_gives_the_loss_and_gradients_of_transformers_own(make: Any, way: str) -> None:
    own = TargetLoss(make())
    own.isolation = "positions"
    expected, theirs = loss_and_gradients(own)
    model = make()
    if way.startswith(VARLEN):
        assert can_be_varlen(model)
        attention.register_varlen()
        model.set_attn_implementation(VARLEN)
    elif way == "eager":
        model.set_attn_implementation("eager")
    loss_of = TargetLoss(model).train()
    assert loss_of.isolation == ("varlen" if way.startswith(VARLEN) else "mask")
    if "recomputed" in way:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found, mine = loss_and_gradients(loss_of)
    torch.testing.assert_close(found, expected)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_under_autocast_the_mask_still_keeps_examples_apart(way: str) -> None:
    model = gpt2()
    model.set_attn_implementation(way)
    loss_of = TargetLoss(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        masked = loss_of(**inputs())[0]
        loss_of.isolation = "positions"
        assert masked.item() == pytest.approx(loss_of(**inputs())[0].item(), rel=1e-3)


def test_with_varlen_a_model_still_generates_as_with_its_own_attention() -> None:
    model, other = gpt2().eval(), gpt2().eval()
    attention.register_varlen()
    model.set_attn_implementation(VARLEN)
    ids = torch.tensor([[0, 0, 7, 8], [3, 4, 5, 6]])
    padded = {
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    assert model.generate(ids, **padded).tolist() == other.generate(ids, **padded).tolist()
    assert keeps_examples_apart(model)


def test_the_kernel_is_given_the_examples_as_torch_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2 rows of 8 tokens, 4 heads and 2 of keys: 16 tokens behind each other, without a copy."""
    seen: dict[str, Any] = {}

    def kernel(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, **named: Any
    ) -> Any:
        seen.update(shapes=(query.shape, key.shape), starts=cu_seq_q, longest=(max_q, max_k), named=named, query=query)
        assert cu_seq_k is cu_seq_q
        return torch.zeros_like(query)

    kernel.__signature__ = attention.inspect.signature(varlen.varlen_attn)  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_by_examples", attention._kernel)
    fused = torch.randn(2, 8, 4 * 8 + 2 * 2 * 8)
    query, key, value = (part.view(2, 8, -1, 8).transpose(1, 2) for part in fused.split([32, 16, 16], dim=2))
    output, _ = attention.varlen_attention(
        torch.nn.Module(), query, key, value, None, scaling=0.25, cu_seq_lens_q=STARTS, max_length_q=8
    )
    assert output.shape == (2, 8, 4, 8)
    assert seen["shapes"] == ((16, 4, 8), (16, 2, 8))
    assert seen["query"].data_ptr() == fused.data_ptr()
    assert seen["longest"] == (8, 8)
    asked = {"enable_gqa": True} if "enable_gqa" in kernel.__signature__.parameters else {}  # type: ignore[attr-defined]
    assert seen["named"] == {"scale": 0.25, "window_size": (-1, 0)} | asked, (
        "PyTorch 2.11's takes fewer keys' heads unasked"
    )


def test_the_kernel_of_torch_takes_what_it_is_given() -> None:
    """The shapes and types, on a device without data; whether the numbers are right only a GPU says."""
    attention.register_varlen()
    config = GPT2Config(vocab_size=257, n_layer=2, n_embd=64, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation(VARLEN)
    ids, starts = torch.zeros(2, 8, dtype=torch.int64, device="meta"), torch.zeros(5, dtype=torch.int32, device="meta")
    told = attention.varlen_inputs(starts, 8) | {"attention_mask": attention.no_mask(ids.device)}
    model.transformer(input_ids=ids, position_ids=ids, use_cache=False, **told).last_hidden_state.sum().backward()
    assert {(p.grad.device.type, p.grad.dtype) for p in model.transformer.parameters() if p.grad is not None} == {
        ("meta", torch.bfloat16)
    }


def test_models_whose_attention_is_of_another_kind_keep_transformers_own_way() -> None:
    windows = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=4))
    capped = AutoModelForCausalLM.from_config(Gemma2Config(**SHAPE, head_dim=8))
    wide = AutoModelForCausalLM.from_config(GemmaConfig(**(SHAPE | {"num_hidden_layers": 1}), head_dim=264))
    for model in (windows, capped):
        assert isolation_of(model) == "positions"
    for model in (windows, capped, wide):
        before = model.config._attn_implementation
        assert not can_be_varlen(model)
        assert model.config._attn_implementation == before
        with pytest.raises(
            UserError, match=r"--attention varlen: model type \w+ computes something else with it .* leave it out"
        ):
            set_attention(model, "varlen", "bf16", 0.0)
    assert can_be_varlen(AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=None)))


class Card:
    """Lets PyTorch say that there is a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        monkeypatch.setenv("DS_ACCELERATOR", "cuda")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@pytest.mark.parametrize(
    ("capability", "precision", "dropout", "reason"),
    [
        ((7, 5), "fp16", 0.0, r"need compute capability 8\.0 .* this GPU has 7\.5"),
        ((9, 0), "fp32", 0.0, "compute in fp16 and bf16 alone, and this run is in fp32"),
        ((9, 0), "bf16", 0.1, "have no dropout, and this run has --dropout 0.1"),
    ],
)
def test_varlen_where_it_cannot_run_is_refused_and_not_chosen(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: Any, dropout: float, reason: str
) -> None:
    Card(monkeypatch, capability)
    with pytest.raises(UserError, match=f"--attention varlen: its kernels {reason}; leave --attention out"):
        check_attention("varlen", precision, dropout)
    check_attention("auto", precision, dropout)
    model = gpt2()
    set_attention(model, "auto", precision, dropout)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)], ids=str)
def test_auto_takes_varlen_where_it_runs(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    Card(monkeypatch, capability)
    model = gpt2()
    set_attention(model, "auto", "fp16", 0.0)
    assert TargetLoss(model).isolation == "varlen"
    for wanted in ("sdpa", "eager"):
        model = gpt2()
        set_attention(model, wanted, "fp16", 0.0)  # type: ignore[arg-type]
        assert model.config._attn_implementation == "sdpa", "what was built stays"


def test_without_a_gpu_varlen_and_flash_attention_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match="--attention varlen: this run is not on an NVIDIA GPU; leave --attention out"):
        check_attention("varlen", "bf16", 0.0)
    with pytest.raises(
        UserError, match="--attention flash_attention_2: this run is not on a GPU; leave --attention out"
    ):
        check_attention("flash_attention_2", "bf16", 0.0)


def test_the_mask_lets_each_token_see_its_example_up_to_itself() -> None:
    """Examples of 2 and 1 tokens, and padding of 1."""
    positions = torch.tensor([[0, 1, 0, 0]])
    seen = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert example_mask(positions, torch.bool)[0, 0].int().tolist() == seen
    added = example_mask(positions, torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert (added[0, 0] == 0).int().tolist() == seen
    assert added[0, 0][added[0, 0] != 0].eq(float("-inf")).all()


class Waits(TorchDispatchMode):
    """Counts operations whose result the host has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_a_forward_and_backward_pass_waits_for_nothing(make: Any, chunked: bool) -> None:
    loss_of = TargetLoss(make(), chunked).train()
    with Waits() as waits:
        loss_of(**inputs())[0].backward()
    assert waits.found == []
    loss_of.isolation = "positions"
    with Waits() as waits:
        loss_of(**inputs())
    assert waits.found == ["aten::_local_scalar_dense"], "transformers' own way asks whether rows are packed"


def test_the_package_flash_attn_is_told_where_examples_begin_and_asks_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is faked by a function that returns the queries; transformers would derive it all in every layer,
    with waits."""
    import transformers.modeling_flash_attention_utils as flash

    seen: list[tuple[list[int], int]] = []

    def package(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, **named: Any
    ) -> torch.Tensor:
        seen.append((cu_seqlens_q.tolist(), named["max_seqlen_q"]))
        return q

    class OnlyLengths(tuple[Any, ...]):
        """A pair of functions, as transformers has it since 5.24, and a function, as before."""

        def __call__(self, *_: Any, **named: Any) -> dict[str, Any]:
            return {name: named[name] for name in ("max_seqlen_q", "max_seqlen_k") if name in named}

    only_lengths = OnlyLengths((OnlyLengths(), OnlyLengths()))

    dense = None  # would let the examples see each other
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda *_, **__: ((dense, package, None, None, None), only_lengths)
    )
    model = gpt2()
    loss_of = TargetLoss(model).bfloat16()
    model.config._attn_implementation, loss_of.isolation = "flash_attention_2", "flash"
    with Waits() as waits:
        loss_of(**inputs())
    assert seen == [([0, 4, 7, 8, 16], 8)] * 2
    assert len(waits.found) <= 1, "transformers' look at the positions, once for all layers"


def test_a_compiled_model_serves_every_number_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.register_varlen()
    monkeypatch.setattr(attention, "_by_examples", lambda query, *_: query * 1.0)
    model = gpt2()
    model.set_attn_implementation(VARLEN)
    loss_of = TargetLoss(model)
    compiled: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph

    loss_of.compiled = True
    model.base_model.compile(dynamic=False, backend=count)
    for starts, longest in (([0, 4, 7, 8, 16], 8), ([0, 8, 16], 8), ([0, 1, 2, 8, 10, 12, 16], 6)):
        loss_of(**(inputs() | {"example_starts": torch.tensor(starts, dtype=torch.int32), "longest_example": longest}))
    assert len(compiled) == 1
