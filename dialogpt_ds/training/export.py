"""A Hugging Face folder of the trained model, compared with the live weights before it is called done."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.errors import RunError
from dialogpt_ds.files import replace_text
from dialogpt_ds.training.settings import Settings

FOLDER = "model"
ORIGIN = "exported_from.json"
"""File in the export that says which optimizer step it is of."""


def export_model(engine: Any, settings: Settings) -> Path:
    """Write output_dir/model: weights in the training precision, config, tokenizer, generation_config.

    Collective: every rank must call.

    Raises:
        RunError: what was written does not load back as it is in the engine.
    """
    weights = gather_weights(engine, settings.zero_stage, keep=settings.world.is_first)
    folder = settings.output_dir / FOLDER
    if settings.world.is_first:
        unfinished = folder.with_name(f"unfinished-{FOLDER}")
        shutil.rmtree(unfinished, ignore_errors=True)
        _write(weights, settings, unfinished)
        _compare(weights, unfinished)
        replace_text(unfinished / ORIGIN, json.dumps({"step": engine.global_steps}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    torch.distributed.barrier()
    return folder


def exported_step(settings: Settings) -> int | None:
    """Return the optimizer step that output_dir/model is of, None where there is no such export."""
    try:
        return int(json.loads((settings.output_dir / FOLDER / ORIGIN).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def gather_weights(engine: Any, zero_stage: int, keep: bool) -> dict[str, torch.Tensor]:
    """Return the model's parameters by name on the CPU, one at a time gathered from all ranks. Collective.

    A tied head comes once, under the name of the embedding.
    """
    import deepspeed

    weights = {}
    for name, parameter in engine.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=zero_stage == 3):
            if keep:
                weights[name] = parameter.detach().cpu().clone()
    return weights


def _write(weights: dict[str, torch.Tensor], settings: Settings, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = settings.model.config
    # A fresh model with the weights put in, so that transformers itself decides how tied tensors are stored.
    model = AutoModelForCausalLM.from_config(config, dtype=next(iter(weights.values())).dtype)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    eos = settings.train.manifest.eos_id
    model.generation_config = GenerationConfig(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos)
    model.save_pretrained(str(folder))
    settings.tokenizer.save_pretrained(str(folder))


def _compare(weights: dict[str, torch.Tensor], folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
    loaded = dict(model.named_parameters())
    different = [name for name in weights.keys() | loaded.keys() if not _equal(weights.get(name), loaded.get(name))]
    if different:
        raise RunError(
            f"the export in {folder} does not load back as trained; tensors that differ: {', '.join(sorted(different)[:5])}"
        )


def _equal(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    return mine is not None and theirs is not None and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
