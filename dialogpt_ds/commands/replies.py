"""The command that prints a few replies: launch/replies.py and dialogpt-replies."""

import os
from dataclasses import dataclass

from dialogpt_ds.commandline import option, parse, run_command
from dialogpt_ds.errors import UserError


@dataclass
class ReplyArguments:
    """Print a model's reply to each prompt."""

    model: str = ""
    """Exported model: output_dir/model of a run, or any Hugging Face folder."""
    prompt: list[str] = option([])
    """One or more prompts, each the first turn of a conversation of its own."""
    seed: int = 0
    """Seed of the sampling."""
    max_new_tokens: int = 40
    """Longest reply (tokens)."""


def main(argv: list[str] | None = None) -> int:
    """Print replies; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def work() -> int:
        arguments = parse(ReplyArguments, "Print a model's reply to each prompt.", argv).arguments
        if not arguments.model or not arguments.prompt:
            raise UserError("give --model FOLDER and --prompt TEXT [TEXT ...]")
        from transformers.utils.logging import disable_progress_bar

        from dialogpt_ds.replies.generate import load_model, reply

        disable_progress_bar()
        model, tokenizer = load_model(arguments.model)
        for prompt in arguments.prompt:
            answer = reply(model, tokenizer, [prompt], arguments.seed, arguments.max_new_tokens)
            print(f"you:   {prompt}\nmodel: {answer}\n")
        return 0

    return run_command(work)
