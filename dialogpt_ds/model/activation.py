"""GPT-2's activation as one kernel: the tanh approximation of GELU (Hendrycks and Gimpel 2016, section 2)."""

from typing import Any

from torch import nn


def fuse_activations(model: nn.Module) -> int:
    """Let a model of transformers compute `gelu_new` and `gelu_fast` by torch's kernel for the same formula; returns
    how many modules.

    transformers computes them as eight operations each. Besides their time and memory these give NaN gradients in fp16
    from |x| = 148 on, where 3 * x**2 leaves its range. The configuration keeps its name for it, and so does what is
    exported.
    """
    from transformers.activations import FastGELUActivation, NewGELUActivation

    found = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (NewGELUActivation, FastGELUActivation)):
                setattr(module, name, nn.GELU(approximate="tanh"))
                found += 1
    return found


def recompute_activations(model: Any) -> None:
    """Let each layer keep its input alone for the backward pass (Chen et al. 2016)."""
    # transformers 5.24 has renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
