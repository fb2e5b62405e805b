"""How large a checkpoint will be, before there is a model."""

from typing import Any


def checkpoint_bytes(num_parameters: int, precision: str) -> int:
    """Return about what a checkpoint takes: weights in the run's precision, fp32 master weights and Adam's two moments.

    The sizes are those of model_states() in training/memory.py less the gradients, which no checkpoint has; measured for 3.4 million
    parameters: 57.7 MB in fp32 and 50.9 in bf16, 3.6 of which are the tokenizer.
    """
    return num_parameters * ((4 if precision == "fp32" else 2) + 12)


def approximate_parameters(config: Any) -> int:
    """Return about how many parameters a causal language model of transformers has, from its configuration: GPT-2's exactly.

    A layer of a GPT-2 of width d has 12 d^2 weights and 13 d biases and norms (Radford et al. 2019).
    """
    width, layers = getattr(config, "hidden_size", 0) or 0, getattr(config, "num_hidden_layers", 0) or 0
    tables = (getattr(config, "vocab_size", 0) or 0) * (1 if getattr(config, "tie_word_embeddings", True) else 2)
    if getattr(config, "model_type", "") == "gpt2":
        tables += config.max_position_embeddings
        return width * tables + layers * (12 * width**2 + 13 * width) + 2 * width
    return width * tables + layers * 12 * width**2
