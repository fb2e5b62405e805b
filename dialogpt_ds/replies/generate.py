"""Generating replies: the prompt is encoded exactly as training encodes a conversation."""

from collections.abc import Sequence
from typing import Any

import torch

from dialogpt_ds.commandline import existing_folder
from dialogpt_ds.errors import UserError
from dialogpt_ds.tokenization import find_tokenizer, make_encoder

TURN_SEPARATOR = " EOS "
"""Between the turns of a prompt with several, as in DialoGPT's files."""


def load_model(folder: str) -> tuple[Any, Any]:
    """Return an exported model and its tokenizer.

    Raises:
        UserError: the folder holds no model.
    """
    from transformers import AutoModelForCausalLM

    existing_folder(folder, "--model")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder!r} holds no model that transformers can load: {error}") from error
    return model.eval(), find_tokenizer(folder)


def turns_of(prompt: str) -> list[str]:
    """Return the turns of a prompt."""
    return [turn.strip() for turn in prompt.split(TURN_SEPARATOR)]


def replies(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[str]],
    seed: int,
    max_new_tokens: int = 40,
    in_step: bool = False,
    device: torch.device | None = None,
) -> list[str]:
    """Return the model's answer to the last turn of each conversation, sampled (nucleus 0.9; Holtzman et al. 2020).

    The prompt is each turn followed by EOS, as in training; the answer ends at its EOS. Where the prompt and the answer
    don't fit into the model's positions, the oldest tokens of the prompt go. All are generated as one batch; random
    numbers of others are left alone.

    Args:
        model: a causal language model of transformers, in whatever mode and precision.
        tokenizer: of it.
        conversations: turns, the newest last.
        seed: of the sampling.
        max_new_tokens: longest answer.
        in_step: ranks go on together until the last has all its answers, as ZeRO-3 needs it. Then collective: every
            rank must call.
        device: where the model computes; None: where its weights are.
    """
    encode = make_encoder(tokenizer)
    prompts = [
        [token for turn in turns for token in [*encode(turn), tokenizer.eos_token_id]] for turns in conversations
    ]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit:
        max_new_tokens = min(max_new_tokens, limit - 1)
        prompts = [ids[-(limit - max_new_tokens) :] for ids in prompts]
    device = device or next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.eos_token_id, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all answers begin at one place
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    was_training = model.training
    model.eval()
    try:
        # A compiled model would be compiled anew for every length.
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager"),
        ):
            torch.manual_seed(seed)
            output = model.generate(
                ids, attention_mask=mask, do_sample=True, top_p=0.9, top_k=0, temperature=1.0,
                max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
                synced_gpus=in_step, remove_invalid_values=True,
                # logits that fp16 can't hold would end a long run here
            )  # fmt: skip
    finally:
        model.train(was_training)
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in output[:, longest:]]


def reply(model: Any, tokenizer: Any, turns: list[str], seed: int, max_new_tokens: int = 40) -> str:
    """Return the model's answer to the last of `turns`, as `replies` does."""
    return replies(model, tokenizer, [turns], seed, max_new_tokens)[0]
