"""How the examples of a row are kept from seeing each other: by a kernel for sequences of several lengths, or by a
mask."""

import inspect
import itertools
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch.nn import functional

from dialogpt_ds.config.arguments import Attention
from dialogpt_ds.config.precision import Precision
from dialogpt_ds.errors import UserError
from dialogpt_ds.hardware import device_of_run
from dialogpt_ds.model.probe import quiet, takes

VARLEN = "varlen"
"""Name under which transformers knows torch's attention for sequences of several lengths."""
VARLEN_CAPABILITY = (8, 0)
"""Compute capability that its kernels need (FlashAttention-2, Dao 2023)."""
LARGEST_HEAD = 256
"""Widest attention head that they take."""
EQUAL = 1e-4
"""Share of the largest logit by which two right computations in fp32 may differ."""

Isolation = Literal["varlen", "flash", "mask", "positions"]
"""What keeps examples apart: torch's kernel or the package flash-attn, both told where the examples begin; a mask that
is made here; or whatever transformers makes of position_ids that restart, for which it waits for the device once in a
forward pass."""


def check_attention(wanted: Attention, precision: Precision, dropout: float) -> None:
    """Refuse an implementation of attention that this machine does not have for the run; raises UserError."""
    if wanted == "varlen":
        problem = varlen_problem(precision, dropout)
        if problem:
            raise UserError(f"--attention varlen: {problem}; leave --attention out, which takes it where it can run")
    elif wanted == "flash_attention_2":
        on_gpu = device_of_run() == "cuda"
        if not on_gpu or find_spec("flash_attn") is None:
            lacks = "the package flash-attn is not installed" if on_gpu else "this run is not on a GPU"
            raise UserError(f"--attention flash_attention_2: {lacks}; leave --attention out for PyTorch's own")
        if precision == "fp32":
            raise UserError(
                "--attention flash_attention_2 computes in fp16 and bf16 alone, and this run is in fp32: leave it out"
            )


def varlen_problem(precision: Precision, dropout: float) -> str | None:
    """Return why torch's attention for sequences of several lengths can't be had here; None where it can."""
    if device_of_run() != "cuda" or torch.version.cuda is None:
        return "this run is not on an NVIDIA GPU"
    return _kernel_problem(torch.cuda.get_device_capability(), precision, dropout)


def _kernel_problem(capability: tuple[int, int], precision: Precision, dropout: float) -> str | None:
    """Return why its kernels can't compute a run on a GPU of a compute capability; None where they can."""
    if capability < VARLEN_CAPABILITY:
        return (
            "its kernels need compute capability 8.0 (A100, RTX 30 and later), and this GPU has "
            f"{capability[0]}.{capability[1]}"
        )
    if precision == "fp32":
        return "its kernels compute in fp16 and bf16 alone, and this run is in fp32"
    if dropout:
        return f"its kernels have no dropout, and this run has --dropout {dropout:g}"
    return None


def set_attention(model: Any, wanted: Attention, precision: Precision, dropout: float) -> None:
    """Give a model, in fp32 on the CPU, the implementation of attention that it is to be trained with.

    Raises:
        UserError: varlen is wanted, and the model's attention is of another kind.
    """
    if wanted == "varlen" and not can_be_varlen(model):
        raise UserError(
            f"--attention varlen: model type {model.config.model_type} computes something else with it than with its "
            f"own attention (windows, capped or biased products, heads wider than {LARGEST_HEAD}); leave it out"
        )
    if wanted == "varlen" or (wanted == "auto" and varlen_problem(precision, dropout) is None and can_be_varlen(model)):
        register_varlen()
        model.set_attn_implementation(VARLEN)


def isolation_on(
    capability: tuple[int, int], model: Any, wanted: Attention, precision: Precision, dropout: float
) -> Isolation:
    """Return what would keep examples apart on a GPU of a compute capability, for a model in fp32 on the CPU."""
    if wanted == "flash_attention_2":
        return "flash"
    runs = wanted in ("auto", "varlen") and _kernel_problem(capability, precision, dropout) is None
    return "varlen" if runs and can_be_varlen(model) else isolation_of(model)


def register_varlen() -> None:
    """Let transformers know torch's attention for sequences of several lengths under the name VARLEN."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(VARLEN, varlen_attention)
    # For calls without the examples' beginnings, such as generation: there it is sdpa.
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally inside of each example; with the signature of transformers' attention functions.

    Args:
        module: layer that asks.
        query: [rows, heads, row_length, head_width].
        key: the same, with as many heads or a divisor of them.
        value: as key.
        attention_mask: not looked at where the examples' beginnings are given.
        dropout: must be 0 then; the kernel has none.
        scaling: of the products; None: 1 / sqrt(head_width).
        cu_seq_lens_q: [examples + 1] int32, where each begins in the flattened rows, and the end; None: an ordinary
            call.
        max_length_q: tokens of the longest example, or more.
        others: what other kinds of attention take.

    Returns:
        [rows, row_length, heads, head_width], and None for the weights.

    Raises:
        ValueError: the layer wants something of its attention that the kernel can't do.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    wanted = [name for name in ("softcap", "s_aux", "position_bias", "sliding_window") if others.get(name) is not None]
    if wanted or dropout or not getattr(module, "is_causal", True):
        raise ValueError(
            f"varlen attention has no {', '.join(wanted) or ('dropout' if dropout else 'bidirectional form')}"
        )
    rows, length = query.shape[0], query.shape[2]
    q, k, v = (
        tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)
    )  # [tokens, heads, head_width], views
    attend = _by_examples if query.device.type == "cpu" else _kernel
    return attend(q, k, v, cu_seq_lens_q, max_length_q, scaling).unflatten(0, (rows, length)), None


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    named: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    # PyTorch 2.11 takes fewer heads of keys unasked.
    if query.shape[1] != key.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        named["enable_gqa"] = True
    output: Any = varlen_attn(query, key, value, starts, starts, longest, longest, **named)
    return output


def _by_examples(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    """Compute the same without a kernel, for devices that have none: examples come one by one."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    outputs = []
    for begin, end in itertools.pairwise(starts.tolist()):
        assert begin < end <= begin + longest, (begin, end, longest)
        q, k, v = (tensor[begin:end].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        outputs.append(
            functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)[0].transpose(0, 1)
        )
    return torch.cat(outputs)


def varlen_inputs(example_starts: torch.Tensor, longest: int) -> dict[str, Any]:
    """Return the keyword arguments that tell the layers where examples begin, under transformers' names for
    FlashAttention."""
    return {
        "cu_seq_lens_q": example_starts,
        "cu_seq_lens_k": example_starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def no_mask(device: torch.device) -> torch.Tensor:
    """Return a mask with four dimensions, which transformers hands on as it is; VARLEN does not look at it."""
    return torch.empty((1, 1, 1, 1), dtype=torch.bool, device=device)


def example_mask(position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what each token of packed rows may see, [rows, 1, row_length, row_length], without waiting for the device.

    Args:
        position_ids: [rows, row_length], 0 where an example begins.
        dtype: bool: whether it may see it; else what is added to the products, 0 or minus infinity.
    """
    example = (position_ids == 0).cumsum(-1)  # 0 1 2 0 1 0 -> 1 1 1 2 2 3
    seen = (example[:, :, None] == example[:, None, :]).tril_().unsqueeze(1)
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(seen.logical_not_(), float("-inf"))


def isolation_of(model: Any) -> Isolation:
    """Return the fastest way to keep examples apart that is right for a model with its implementation of attention, in
    fp32 on the CPU.

    What transformers makes of restarting positions is the measure; that it is right is probe.keeps_examples_apart()'s
    matter.
    """
    name = getattr(model.config, "_attn_implementation", None) or ""
    if not takes(model, "position_ids"):
        return "positions"
    if name == VARLEN:
        return "varlen"
    if "flash" in name:
        return "flash"
    # Layers with a mask of their own would be given ours.
    masked = (
        name in ("sdpa", "eager")
        and not _has_windows(model.config.get_text_config())
        and _is_right(model, name, "mask")
    )
    return "mask" if masked else "positions"


def can_be_varlen(model: Any) -> bool:
    """Return whether VARLEN computes what a model's own attention does; on the CPU, in fp32."""
    config = model.config.get_text_config()
    if _has_windows(config) or not takes(model, "position_ids"):
        return False
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head <= LARGEST_HEAD and head % 8 == 0 and _is_right(model, VARLEN, "varlen")


def _is_right(model: Any, implementation: str, isolation: Isolation) -> bool:
    """Compare the logits of a row of two examples with those that transformers' own way gives."""
    device = next(model.parameters()).device
    ids = torch.tensor([[5, 3, 8, 1, 2, 7, 4]], device=device) % model.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device)
    before = model.config._attn_implementation
    with quiet(model):
        own = model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False).logits
        try:
            if implementation != before:
                register_varlen()
                model.set_attn_implementation(implementation)
            if isolation == "mask":
                ours: dict[str, Any] = {"attention_mask": example_mask(positions, own.dtype)}
            else:
                starts = torch.tensor([0, 4, 7], dtype=torch.int32, device=device)
                ours = varlen_inputs(starts, 4) | {"attention_mask": no_mask(device)}
            found = model(input_ids=ids, position_ids=positions, use_cache=False, **ours).logits
        except Exception:  # of a model that takes no such mask or arguments; what it raises is its own matter
            return False
        finally:
            if model.config._attn_implementation != before:
                model.set_attn_implementation(before)
    return bool((found - own).abs().max() <= EQUAL * own.abs().max())


def _has_windows(config: Any) -> bool:
    """Return whether some layers see less than all tokens before theirs, or are no attention at all."""
    if getattr(config, "attention_chunk_size", None):
        return True
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
