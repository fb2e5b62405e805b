"""A Hugging Face folder of a trained model, loaded back and compared with the live one before it is called done."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.distributed.lone_work import Tell
from dialogpt_ds.errors import RunError, in_a_line
from dialogpt_ds.export.target import ORIGIN
from dialogpt_ds.files import replace_text, sha256_of_file

MODEL_FOLDER = "model"
"""Name of the export in output_dir, and of the description in a checkpoint."""
PROBE_TOKENS = 32
"""Tokens that the live and the loaded model are compared on."""
HALF_TOLERANCE, FP32_TOLERANCE = 0.1, 2e-4
"""Largest difference of logits, as a share of the largest logit, where weights are in half precision and in fp32.
Another attention kernel alone changes a trained model of 135 M parameters by 0.023 in bf16."""
CPU = torch.device("cpu")


def write_description(config: Any, tokenizer: Any, eos_id: int, trained_length: int, folder: Path) -> None:
    """Write all that an export needs beside weights: config, generation_config and tokenizer."""
    from transformers import GenerationConfig

    described = type(config).from_dict(config.to_dict() | {"trained_max_length": trained_length})
    described.save_pretrained(str(folder))
    GenerationConfig(bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=eos_id).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


@dataclass(frozen=True)
class Probe:
    """What the live model says to a fixed row of tokens."""

    logits: torch.Tensor
    """[PROBE_TOKENS, vocabulary], on the CPU in fp32."""
    device: torch.device
    config: Any
    """The live model's own, not as it was stored."""

    @property
    def attention(self) -> str | None:
        """Its implementation of attention: another one rounds differently."""
        return getattr(self.config, "_attn_implementation", None)


def probe_ids(vocabulary: int) -> torch.Tensor:
    """Return the row that models are compared on, [1, PROBE_TOKENS]: spread over the vocabulary.

    What the first ids stand for is seldom in a text, and half precision carries a model far astray on them: 0.15 of the
    largest logit between two attention kernels.
    """
    return (torch.arange(1, PROBE_TOKENS + 1) * vocabulary // (PROBE_TOKENS + 1)).unsqueeze(0)


@torch.no_grad()
def probe(model: Any, device: torch.device) -> Probe:
    """Run a model of transformers on the fixed row. Under ZeRO-3 collective: every rank must call."""
    was_training = model.training
    model.eval()
    try:
        # A compiled model would be compiled anew for this row, and rounds differently from the one it is compared with.
        with torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=probe_ids(model.config.vocab_size).to(device), use_cache=False).logits
    finally:
        model.train(was_training)
    return Probe(logits[0].float().cpu(), device, model.config)


def write_export(
    weights: dict[str, torch.Tensor],
    live: Probe | None,
    description: Path,
    folder: Path,
    card: str,
    step: int,
    tell: Tell = lambda doing: None,
) -> str | None:
    """Write a Hugging Face folder, load it back, compare it, and only then give it its name. One that is there is
    replaced.

    Args:
        weights: every parameter by its name in the model, in the type they are to be stored in; a tied head once.
        live: what the model that they are of says; None compares with a model that is made of the weights here.
        description: folder with config, generation_config and tokenizer.
        folder: where to.
        card: text of the model card, README.md.
        step: optimizer step that the weights are of.
        tell: is told what is being done.

    Returns:
        A warning, where the weights load back as they are but the logits could not be compared.

    Raises:
        RunError: what was written does not load back as it is.
        OSError: it can't be written.
    """
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        tell(f"writing {unfinished}")
        model = _model_of(weights, description)
        model.save_pretrained(str(unfinished))
        for file in sorted(description.iterdir()):
            if file.is_file():
                shutil.copyfile(file, unfinished / file.name)
        _set_dtype(unfinished / "config.json", model.dtype)
        replace_text(unfinished / "README.md", card)
        tell(f"comparing {unfinished} with the model")
        warning = _compare(weights, live, model, unfinished)
        tell(f"reading {unfinished} for its checksums")
        files = {f.name: {"size": f.stat().st_size, "sha256": sha256_of_file(f)} for f in sorted(unfinished.iterdir())}
        replace_text(unfinished / ORIGIN, json.dumps({"step": step, "files": files}, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        return warning
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def exported_step(folder: Path) -> int | None:
    """Return the optimizer step that an export is of; None where there is no whole one."""
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == sums["size"] for name, sums in origin["files"].items())
        return int(origin["step"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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


def _model_of(weights: dict[str, torch.Tensor], description: Path) -> Any:
    """Return a model with the weights put in, so that transformers itself decides how tied tensors are stored."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(description), local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=next(iter(weights.values())).dtype)
    missing = set(dict(model.named_parameters())) - set(weights)
    if missing:
        raise RunError(
            f"the weights lack {len(missing)} tensors of the model in {description}: {', '.join(sorted(missing)[:5])}"
        )
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


def _set_dtype(file: Path, dtype: torch.dtype) -> None:
    """Say in config.json what the weights are stored in."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    replace_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _compare(weights: dict[str, torch.Tensor], live: Probe | None, rebuilt: Any, folder: Path) -> str | None:
    """Load an export back, and compare its weights bit for bit, its logits within rounding; returns a warning where
    those can't be.

    Raises:
        RunError: they differ.
    """
    from transformers import AutoModelForCausalLM

    attention = {"attn_implementation": live.attention} if live is not None and live.attention else {}
    loaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", **attention)
    found = dict(loaded.named_parameters())
    different = [name for name in weights.keys() | found.keys() if not _equal(weights.get(name), found.get(name))]
    if different:
        raise RunError(
            f"the export in {folder} does not load back as trained; tensors that differ: "
            f"{', '.join(sorted(different)[:5])}"
        )
    reasons = []
    # Equal weights are what an export must have. That a comparison of logits is not possible is no reason to end a
    # finished run.
    if live is not None:
        try:
            mine = probe(loaded.to(live.device), live.device)
        except Exception as error:  # often torch.OutOfMemoryError, beside weights and optimizer
            reasons.append(f"on {live.device}: {in_a_line(error)}")
            torch.cuda.empty_cache()  # nothing without a GPU
        else:
            _check(mine, live, FP32_TOLERANCE if loaded.dtype == torch.float32 else HALF_TOLERANCE, folder)
            return None
    try:
        mine, theirs = _both_in_fp32(loaded, rebuilt, live, weights)
    except Exception as error:
        reasons.append(f"on the CPU: {in_a_line(error)}")
        return (
            "warning: the weights of the export were compared bit for bit and are equal; the logits were not compared "
            f"({'; '.join(reasons)})"
        )
    _check(mine, theirs, FP32_TOLERANCE, folder)
    return None


def _both_in_fp32(
    loaded: Any, rebuilt: Any, live: Probe | None, weights: dict[str, torch.Tensor]
) -> tuple[Probe, Probe]:
    """Return what the loaded model says on the CPU, and a model of the same weights with the configuration of the live
    one.

    In fp32 whatever the weights are in: a CPU is a hundred times slower in fp16, and its bf16 rounds differently from a
    GPU's.
    """
    if live is not None:
        from transformers import AutoModelForCausalLM

        rebuilt = AutoModelForCausalLM.from_config(
            copy.deepcopy(live.config), dtype=loaded.dtype, attn_implementation="eager"
        )
        rebuilt.load_state_dict(weights, strict=False)
        rebuilt.tie_weights()
        loaded.set_attn_implementation("eager")  # others may need a GPU
    theirs = probe(rebuilt.float(), CPU)
    return probe(loaded.to(CPU).float(), CPU), theirs


def _check(mine: Probe, theirs: Probe, tolerance: float, folder: Path) -> None:
    """Raise RunError where logits differ by more than rounding."""
    error = float((mine.logits - theirs.logits).abs().max()) / max(float(theirs.logits.abs().max()), 1e-6)
    if not error <= tolerance:
        raise RunError(
            f"the export in {folder} loads, but doesn't say what the trained model says: its logits differ by "
            f"{error:.3g} of the largest, {tolerance:g} is allowed"
        )


def _equal(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    return mine is not None and theirs is not None and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
