"""The loss equals transformers' own on the unpacked examples, for any packing, weights, ranks and accumulation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from dialogpt_ds.distributed.world import World
from dialogpt_ds.model.loss import TargetLoss, to_tensors
from dialogpt_ds.order.batches import TURN_GROUPS, RankSlice, padding_rows, rank_step
from dialogpt_ds.order.mixture import GlobalBatch, Mixture, MixtureKey, MixturePosition
from dialogpt_ds.order.position import OrderKey
from dialogpt_ds.shards.reader import ShardDirectory
from tests.ranks import rank_tasks
from tests.ranks.rank_pool import RankPool

EOS = 50_256
START = MixturePosition.start()


def stream_of(shards: Path, row_length: int = 64, packed: bool = True) -> Mixture:
    directory = ShardDirectory.open(str(shards), "test")
    key = OrderKey(directory.manifest.fingerprint, 42, row_length, 64, packed)
    return Mixture([directory], MixtureKey((key,), (1,)), [()])


def tiny_model(**config: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(42)
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**(shape | config)))


def examples_of(batch: GlobalBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each example of a batch, unpacked: token ids and weights per token."""
    found = []
    for segment, row in batch.rows:
        content = segment.content()
        packing = segment.window.packing
        for example in packing.examples[packing.starts[row] : packing.starts[row + 1]]:
            tokens = content.tokens[content.starts[example] : content.starts[example + 1]].astype("int64")
            turns = slice(content.turn_starts[example], content.turn_starts[example + 1])
            weights = np.repeat(content.turn_weights[turns], content.turn_lengths[turns])
            found.append((torch.from_numpy(tokens), torch.from_numpy(weights)))
    return found


def test_the_loss_is_transformers_own_on_the_unpacked_examples(shards: Path) -> None:
    """With all weights 1: sum over targets of GPT2LMHeadModel(input_ids, labels)'s mean times its number of labels."""
    stream, model = stream_of(shards), tiny_model()
    batch = stream.batch(START, 8)
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens, weights in examples_of(batch):
            labels = torch.where(weights > 0, tokens, -100)
            number = int((labels[1:] != -100).sum())
            total += model(input_ids=tokens[None], labels=labels[None]).loss.item() * number
            count += number
        micro = rank_step(batch, RankSlice(0, 1, 8, 1), stream.row_length, EOS).micro_batches[0]
        sums = TargetLoss(model)(**to_tensors(micro, "cpu"))
    assert count == batch.rows.num_targets
    assert sums.nll_by_turn.sum().item() / count == pytest.approx(total / count, abs=1e-5)


def reference(batch: GlobalBatch, model: Any) -> torch.Tensor:
    """sum(weight * nll) / sum(weight) over unpacked examples, from the model's full logits."""
    weighted, weight = torch.zeros(()), 0.0
    for tokens, weights in examples_of(batch):
        nll = functional.cross_entropy(model(input_ids=tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        weighted = weighted + (nll * weights[1:]).sum()
        weight += weights[1:].sum().item()
    return weighted / weight


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_weighted_loss_and_gradients_equal_those_of_the_unpacked_examples(shards: Path, implementation: str) -> None:
    stream, model = stream_of(shards), tiny_model(attn_implementation=implementation)
    batch = stream.batch(START, 6)
    assert 0 < batch.rows.weight_sum < batch.rows.num_targets, "the data has weights between 0 and 1"
    expected = reference(batch, model)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    micro = rank_step(batch, RankSlice(0, 1, 6, 1), stream.row_length, EOS).micro_batches[0]
    weighted = TargetLoss(model)(**to_tensors(micro, "cpu")).weighted
    (weighted / batch.rows.weight_sum).backward()
    assert weighted.item() / batch.rows.weight_sum == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_padding_and_unpacking_change_nothing(shards: Path) -> None:
    model = TargetLoss(tiny_model())
    sums = []
    for row_length, packed in ((64, True), (64, False), (200, True)):
        stream, position, total, targets = stream_of(shards, row_length, packed), START, 0.0, 0
        whole = stream.batch(position, 1).rows.segments[0].window.num_rows
        batch = stream.batch(position, whole)
        with torch.no_grad():
            micro = rank_step(batch, RankSlice(0, 1, whole, 1), stream.row_length, EOS).micro_batches[0]
            total, targets = model(**to_tensors(micro, "cpu"))[0].item(), batch.rows.num_targets
        sums.append((total / batch.rows.weight_sum, targets))
    assert sums[0] == pytest.approx(sums[1], abs=1e-5)
    assert sums[0] == pytest.approx(sums[2], abs=1e-5)


def test_rows_of_padding_give_zero() -> None:
    with torch.no_grad():
        sums = TargetLoss(tiny_model())(**to_tensors(padding_rows(2, 64, EOS), "cpu"))
    assert not any(found.any() for found in sums)


def test_the_short_way_is_taken_only_where_it_is_the_models_own() -> None:
    from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig

    shape = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    assert TargetLoss(tiny_model()).head_is_linear
    assert TargetLoss(AutoModelForCausalLM.from_config(LlamaConfig(**shape))).head_is_linear
    scaled = AutoModelForCausalLM.from_config(
        CohereConfig(**shape, logit_scale=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    assert not TargetLoss(scaled).head_is_linear, "Cohere scales its logits"


def test_a_llama_keeps_packed_examples_apart(shards: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=50_257,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    stream = stream_of(shards)
    batch = stream.batch(START, 4)
    with torch.no_grad():
        weighted, *_ = TargetLoss(model)(
            **to_tensors(rank_step(batch, RankSlice(0, 1, 4, 1), stream.row_length, EOS).micro_batches[0], "cpu")
        )
        assert weighted.item() / batch.rows.weight_sum == pytest.approx(reference(batch, model).item(), abs=1e-5)


@pytest.fixture(scope="module")
def expected(shards: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of 8 rows in one process, without DeepSpeed."""
    from dialogpt_ds.model.load import build_model, find_model

    torch.manual_seed(42)
    model = build_model(find_model("tiny", 0.0, EOS, 50_257), None)
    stream = stream_of(shards)
    loss = reference(stream.batch(START, 8), model)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_and_accumulation_give_the_loss_and_gradients_of_one_batch(
    two_ranks: RankPool,
    shards: Path,
    tmp_path: Path,
    expected: tuple[float, dict[str, torch.Tensor]],
    stage: int,
    accumulation: int,
) -> None:
    config = rank_tasks.write_deepspeed(tmp_path, stage, "fp32", gradient_clipping=0.0)
    argv = ["--model", "tiny", "--train_input_file", str(shards), "--skip_eval", "--deepspeed_config", config,
            "--train_batch_size", "4", "--gradient_accumulation_steps", str(accumulation)]  # fmt: skip
    (loss, gradients), (other_loss, _) = two_ranks.run(rank_tasks.loss_and_gradients, argv)
    assert loss == other_loss, "all ranks agree to the bit"
    assert loss == pytest.approx(expected[0], abs=1e-5)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "options",
    [["--valid_batch_size", "1"], ["--valid_batch_size", "7"], ["--packing", "False"], ["--max_seq_length", "150"]],
)
def test_evaluation_does_not_depend_on_batch_size_packing_or_row_length(
    two_ranks: RankPool, shards: Path, tmp_path: Path, options: list[str]
) -> None:
    config = rank_tasks.write_deepspeed(tmp_path, 3, "fp32")
    argv = [
        "--model",
        "tiny",
        "--train_input_file",
        str(shards),
        "--eval_input_file",
        str(shards),
        "--deepspeed_config",
        config,
    ]
    (loss, targets), (other, _) = two_ranks.run(rank_tasks.evaluation, argv + options)
    directory = ShardDirectory.open(str(shards), "test")
    assert loss == other
    assert targets == directory.manifest.totals["target_tokens"]
    assert loss == pytest.approx(mean_nll(shards), abs=1e-5)


def mean_nll(shards: Path) -> float:
    """The untrained tiny model's mean loss over all targets, one example at a time."""
    torch.manual_seed(42)
    from dialogpt_ds.model.load import build_model, find_model

    model, total, count = build_model(find_model("tiny", 0.0, EOS, 50_257), None).eval(), 0.0, 0
    stream = stream_of(shards)
    whole = stream.batch(START, 1).rows.segments[0].window.num_rows
    with torch.no_grad():
        for tokens, weights in examples_of(stream.batch(START, whole)):
            nll = functional.cross_entropy(model(input_ids=tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
            total += nll[weights[1:] > 0].double().sum().item()
            count += int((weights[1:] > 0).sum())
    return total / count


def test_the_world_of_a_test_is_the_pools(two_ranks: RankPool) -> None:
    assert two_ranks.run(world_of) == [World(0, 2, 0), World(1, 2, 1)]


def world_of(world: World) -> World:
    return world


def test_sums_by_turn_are_those_of_each_turns_targets(shards: Path) -> None:
    """Computed example by example from the model's full logits: the turn of a target is counted in its example, from
    1."""
    stream, model = stream_of(shards), tiny_model()
    batch = stream.batch(START, 8)
    expected = torch.zeros(2, len(TURN_GROUPS))
    with torch.no_grad():
        for segment, row in batch.rows:
            packing, content = segment.window.packing, segment.content()
            for example in packing.examples[packing.starts[row] : packing.starts[row + 1]]:
                tokens = torch.tensor(
                    content.tokens[content.starts[example] : content.starts[example + 1]].astype("int64")
                )
                nll = functional.cross_entropy(
                    model(input_ids=tokens[None]).logits[0, :-1], tokens[1:], reduction="none"
                )
                place = 0
                for number, turn in enumerate(
                    range(content.turn_starts[example], content.turn_starts[example + 1]), start=1
                ):
                    length, weight = int(content.turn_lengths[turn]), float(content.turn_weights[turn])
                    if weight > 0:
                        losses = nll[place - 1 : place - 1 + length]
                        group = {2: 0, 3: 1}.get(number, 2)
                        expected[:, group] += torch.stack([losses.sum() * weight, losses.sum()])
                    place += length
        micro = rank_step(batch, RankSlice(0, 1, 8, 1), stream.row_length, EOS).micro_batches[0]
        _, *by_turn = TargetLoss(model)(**to_tensors(micro, "cpu"))
    assert (expected[1] > 0).all(), "the data has turns of every group"
    torch.testing.assert_close(torch.stack(by_turn), expected, rtol=1e-4, atol=1e-3)


def test_two_ranks_give_the_losses_by_turn_of_one(
    two_ranks: RankPool, one_rank: RankPool, shards: Path, tmp_path: Path
) -> None:
    common = ["--model", "tiny", "--train_input_file", str(shards), "--skip_eval", "--lr_schedule", "None"]
    common += [
        "--deepspeed_config",
        rank_tasks.write_deepspeed(tmp_path, 1, "fp32"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    both = two_ranks.run(
        rank_tasks.turn_losses, [*common, "--train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    )
    alone = one_rank.run(
        rank_tasks.turn_losses, [*common, "--train_batch_size", "8", "--gradient_accumulation_steps", "1"]
    )[0]
    assert both[0] == both[1]
    assert set(alone) == set(TURN_GROUPS)
    assert both[0] == pytest.approx(alone, abs=1e-5)


def test_the_sums_by_turn_are_exact_under_autocast_and_one_infinite_loss_stays_in_its_group(shards: Path) -> None:
    stream, model = stream_of(shards), tiny_model()
    micro = rank_step(stream.batch(START, 8), RankSlice(0, 1, 8, 1), stream.row_length, EOS).micro_batches[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sums = TargetLoss(model)(**to_tensors(micro, "cpu"))
        assert sums.weighted_by_turn.sum().item() == pytest.approx(sums.weighted.item(), rel=1e-6)
        tensors = to_tensors(micro, "cpu")
        tensors["weights"][int((tensors["turn_groups"] == 1).nonzero()[0])] = torch.inf
        sums = TargetLoss(model)(**tensors)
    assert sums.weighted_by_turn.isfinite().tolist() == [True, False, True]
