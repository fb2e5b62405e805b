"""Published speeds of GPT-2 on GPUs, and what the cost model says about the same settings."""

from dataclasses import dataclass
from typing import Any

import torch

from dialogpt_ds.model.gpu_specs import gpu_of
from dialogpt_ds.model.loss import Planned
from dialogpt_ds.model.micro_batch_trace import Trace, planned_loss, trace
from dialogpt_ds.model.presets import PRESETS, VOCABULARY
from dialogpt_ds.model.roofline import cost_of
from dialogpt_ds.model.workload import Workload

ROWS, ROW_LENGTH = 12, 1_024
TARGETS_OF_ALL = 1.0
PADDED_VOCABULARY = 50_304
"""What nanoGPT, litgpt and llm.c take for 50,257."""


@dataclass(frozen=True)
class Published:
    """Tokens a second of one GPU: rows of 1,024 tokens, each of them a target, in bf16."""

    program: str
    model: str
    """Preset of the same shape."""
    gpu: str
    tokens_per_second: float
    fused_loss: bool
    """Whether the loss reads the logits as they are; else it is PyTorch's cross_entropy of a copy in fp32."""


PUBLISHED = (
    Published("llm.c", "117M", "A100-80", 218_000, True),
    Published("llm.c", "345M", "A100-80", 80_000, True),
    Published("llm.c", "762M", "A100-80", 38_000, True),
    Published("llm-foundry", "117M", "A100-40", 156_000, True),
    Published("llm-foundry", "345M", "A100-40", 65_000, True),
    Published("llm-foundry", "762M", "A100-40", 30_000, True),
    Published("llm-foundry", "762M", "H100", 79_000, True),
    Published("litgpt", "117M", "A100-40", 110_000, False),
    Published("nanoGPT", "117M", "A100-40", 107_000, False),
)
"""As their READMEs and tables have them."""
LOWEST, HIGHEST = 0.85, 1.20
"""What is modelled divided by what was published lies between these."""
ERROR = (
    f"against {len(PUBLISHED)} published figures of an A100 or H100 it gives {LOWEST:.2f} to {HIGHEST:.2f} times what "
    "was measured; what it says about links and hosts was held against nothing"
)


def dense_trace(model: str, fused_loss: bool) -> Trace:
    """Return the trace of a micro-batch of rows that are one example each, with every token a target."""
    planned = Planned(torch.device("cuda"), "varlen", head_is_linear=fused_loss)
    loss = planned_loss(preset_config(model, VOCABULARY if fused_loss else PADDED_VOCABULARY), torch.bfloat16, planned)
    return trace(loss, Workload.of_equal_examples(ROWS, ROW_LENGTH, ROW_LENGTH, TARGETS_OF_ALL))


def modelled(published: Published, dense: Trace) -> float:
    """Return the tokens a second that the cost model gives for a published setting, from its `dense_trace`."""
    return dense.workload.tokens / cost_of(dense, gpu_of(published.gpu), VOCABULARY).seconds


def preset_config(name: str, vocabulary: int = VOCABULARY) -> Any:
    """Return transformers' configuration of a preset, without dropout."""
    from transformers import GPT2Config

    shape = PRESETS[name]
    return GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        vocab_size=vocabulary,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
