"""The head and the loss in one give what linear(), float() and cross_entropy() give, for every form of the weights."""

import math

import pytest
import torch
from torch.nn import functional

from dialogpt_ds.model import head
from dialogpt_ds.model.head import head_nll

VOCABULARY, WIDTH, TARGETS = 1_003, 32, 300
Found = tuple[torch.Tensor, list[torch.Tensor]]


def inputs(kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return states, weight, bias and labels, of which some are none."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(TARGETS, WIDTH, generator=random).to(kind)
    weight, bias = (torch.randn(VOCABULARY, *shape, generator=random).mul(0.3).to(kind) for shape in ((WIDTH,), ()))
    labels = torch.randint(VOCABULARY, (TARGETS,), generator=random)
    labels[-40:] = head.IGNORED_LABEL
    return hidden, weight, bias, labels


def plain(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits, labels, reduction="none", ignore_index=head.IGNORED_LABEL)


def loss_and_gradients(
    function: object, kind: torch.dtype, scale: float = 1.0, computed_in: torch.dtype | None = None
) -> Found:
    hidden, weight, bias, labels = inputs(kind)
    leaves = [tensor.to(computed_in or kind, copy=True).requires_grad_() for tensor in (hidden, weight, bias)]
    nll = function(*leaves, labels)  # type: ignore[operator]
    factors = torch.linspace(0.5, 1.5, TARGETS)
    (nll * factors * scale).sum().backward()
    return nll.detach(), [leaf.grad for leaf in leaves]  # type: ignore[misc]


@pytest.mark.parametrize("columns", [1, 64], ids=["as it is", "padded"])
@pytest.mark.parametrize("piece", [None, 77], ids=["whole", "in pieces"])
@pytest.mark.parametrize(
    ("kind", "scale"), [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float16, 2.0**10)], ids=str
)
def test_losses_and_gradients_are_those_of_the_plain_way(
    columns: int, piece: int | None, kind: torch.dtype, scale: float
) -> None:
    nll, gradients = loss_and_gradients(lambda h, w, b, ids: head_nll(h, w, b, ids, piece, columns), kind, scale)
    expected, theirs = loss_and_gradients(plain, kind, scale)
    _, truth = loss_and_gradients(plain, kind, scale, torch.float64)
    assert nll.dtype == torch.float32
    assert nll[-40:].eq(0).all(), "no target, no loss"
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=1e-6)
    for mine, usual, right in zip(gradients, theirs, truth, strict=True):
        assert mine.dtype == kind
        error, allowed = (float((found.double() - right).norm()) for found in (mine, usual))
        # Each piece's product is rounded before the sum, which is in fp32.
        assert error <= (1.1 if piece is None else 1.5) * allowed + 1e-6 * float(right.norm()), (
            "as exact as the plain way"
        )


def test_the_padded_head_gives_the_same_bits() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    found = []
    for columns in (1, 64):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        nll = head_nll(*leaves, None, labels, None, columns)
        nll.sum().backward()
        assert leaves[1].grad is not None
        assert leaves[1].grad.shape == weight.shape, "the stored weights are as they were"
        found.append([nll.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_columns_of_padding_are_no_tokens() -> None:
    """With logits of -20 everywhere a column of zeros would take all of the probability."""
    hidden, weight = torch.full((3, 4), -1.0), torch.full((5, 4), 5.0)
    nll = head_nll(hidden, weight, None, torch.tensor([0, 2, 4]), None, 64)
    torch.testing.assert_close(nll, torch.full((3,), math.log(5)))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    head_nll(hidden, weight, None, labels, None, 1).sum().backward()
    assert (hidden.grad is None, weight.grad is None) == (frozen == "hidden", frozen == "weight")


def test_under_autocast_the_product_is_in_half_precision_and_the_sums_are_not() -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        nll = head_nll(hidden, weight, bias, labels, None, 1)
    nll.sum().backward()
    half = [tensor.detach().bfloat16() for tensor in (hidden, weight, bias)]
    assert torch.equal(nll.detach(), plain(*half, labels))
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_the_logits_are_kept_once_and_in_the_weights_precision() -> None:
    hidden, weight, _, labels = inputs(torch.bfloat16)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    for piece, logits in ((None, TARGETS * VOCABULARY * 2), (64, 0)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            head_nll(hidden, weight.requires_grad_(), None, labels, piece, 1)
        mine = (hidden.numel() + weight.numel()) * 2 + labels.numel() * 8 + TARGETS * 4
        assert sum(saved.values()) == mine + logits


def test_a_second_backward_pass_is_an_error_and_no_wrong_gradient() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    loss = head_nll(hidden.requires_grad_(), weight, None, labels, None, 1).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_the_compiled_loss_gives_the_same_for_any_number_of_targets(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU computes with, compiled for a CPU."""
    monkeypatch.setattr(head, "_compiled", None)
    expected = loss_and_gradients(lambda h, w, b, ids: head_nll(h, w, b, ids, None, 64), kind)
    pieces = loss_and_gradients(lambda h, w, b, ids: head_nll(h, w, b, ids, 77, 64), kind)
    assert head.compile_loss(torch.device("cpu"), VOCABULARY, kind) is None
    for piece, (nll, gradients) in ((None, expected), (77, pieces)):
        found, theirs = loss_and_gradients(lambda h, w, b, ids, piece=piece: head_nll(h, w, b, ids, piece, 64), kind)
        torch.testing.assert_close(found, nll, rtol=1e-5, atol=1e-5)
        for mine, usual in zip(theirs, gradients, strict=True):
            torch.testing.assert_close(mine, usual, rtol=2e-2 if kind == torch.bfloat16 else 1e-4, atol=1e-3)


def test_a_step_finds_the_loss_compiled_whatever_its_number_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_compiled", None)
    counts = torch._dynamo.utils.counters["stats"]
    assert head.compile_loss(torch.device("cpu"), VOCABULARY, torch.bfloat16) is None
    at_the_start = counts["unique_graphs"]
    for targets in (128, 384, 640):
        hidden, weight = (
            torch.ones(size, WIDTH, dtype=torch.bfloat16, requires_grad=True) for size in (targets, VOCABULARY)
        )
        head_nll(hidden, weight, None, torch.arange(targets), None, 1).sum().backward()
    assert counts["unique_graphs"] == at_the_start


def test_a_loss_that_cannot_be_compiled_is_computed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(head, "_compiled", None)
    assert "Failed to find C compiler" in str(head.compile_loss(torch.device("cpu"), VOCABULARY, torch.float32))
    assert head._compiled is None
    nll, _ = loss_and_gradients(lambda h, w, b, ids: head_nll(h, w, b, ids, None, 1), torch.float32)
    torch.testing.assert_close(nll, loss_and_gradients(plain, torch.float32)[0])


def test_a_compiled_loss_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: lambda *tensors: tuple(tensors[0].sum(1).float() for _ in range(2))
    )
    monkeypatch.setattr(head, "_compiled", None)
    assert (
        head.compile_loss(torch.device("cpu"), VOCABULARY, torch.float32) == "what was compiled computes something else"
    )
    assert head._compiled is None
