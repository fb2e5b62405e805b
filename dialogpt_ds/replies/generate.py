"""Generating a reply: the prompt is encoded exactly as training encodes a conversation."""

from typing import Any

import torch

from dialogpt_ds.commandline import existing_folder
from dialogpt_ds.errors import UserError
from dialogpt_ds.tokenization import find_tokenizer, make_encoder


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


def reply(model: Any, tokenizer: Any, turns: list[str], seed: int, max_new_tokens: int = 40) -> str:
    """Return the model's answer to the last of `turns`, sampled (nucleus 0.9; Holtzman et al. 2020).

    The prompt is each turn followed by EOS, as in training; the answer ends at its EOS. Where the prompt and the answer don't fit into
    the model's positions, the oldest tokens of the prompt go.
    """
    encode = make_encoder(tokenizer)
    ids = [token for turn in turns for token in [*encode(turn), tokenizer.eos_token_id]]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit:
        ids = ids[-(limit - max_new_tokens) :]
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=True, top_p=0.9,
            max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
