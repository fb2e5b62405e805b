"""DialoGPT's .pkl files: the state dict of a GPT-2, read without running what a pickle may hold."""

import pickle
from pathlib import Path
from typing import Any

from dialogpt_ds.errors import UserError
from dialogpt_ds.model.presets import Gpt2Shape, gpt2_shape

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_CONTAINERS = ("state_dict", "model_state_dict", "model")
"""Keys under which some training scripts put the state dict."""
_MASKS = (".attn.bias", ".attn.masked_bias")
"""Constants that older GPT-2 code kept among its weights."""
_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}
"""Names of a norm's parameters in the code of 2018."""


def is_pkl(name: str) -> bool:
    """Return whether a name is that of such a file, by its ending."""
    return name.endswith(".pkl")


def read_pkl(path: str, what: str) -> dict[str, Any]:
    """Return the tensors of a .pkl file under the names that transformers' GPT2LMHeadModel has for them, in the type
    they are in.

    A head equal to the embedding, as in every released model, is left out: it is tied.

    Args:
        path: the file.
        what: the option that named it, for messages.

    Raises:
        UserError: it is missing, damaged, no GPT-2, or holds anything but tensors (which is not run).
    """
    import torch

    loaded = _load(path, what)
    for container in _CONTAINERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(container), dict):
            loaded = loaded[container]
    if not isinstance(loaded, dict) or not all(torch.is_tensor(value) for value in loaded.values()):
        raise UserError(f"{what} {path!r} holds no state dict (names with tensors), which a DialoGPT .pkl does")
    weights = {_name(name): tensor for name, tensor in loaded.items() if not name.endswith(_MASKS)}
    head = weights.get(HEAD)
    if head is not None and EMBEDDING in weights and torch.equal(head, weights[EMBEDDING]):
        del weights[HEAD]
    _check(weights, path, what)
    return weights


def _load(path: str, what: str) -> Any:
    import torch

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{what} {path!r} does not exist, or is no file (looked in {file.absolute().parent})")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the reader raise anything
        if not isinstance(error, pickle.UnpicklingError) or "GLOBAL" not in str(error):
            reason = _reason(error)
            raise UserError(
                f"{what} {path!r} can't be read as a .pkl of PyTorch with tensors alone; is it whole? ({reason})"
            ) from error
        raise UserError(
            f"{what} {path!r} holds more than tensors, and loading it would run code that came with the file, so it is "
            "refused. If you trust where it is from, load it there with torch, and save its state dict alone with "
            f"torch.save. ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Return the sentence of torch's message that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else repr(error)
    )[:200]


def _name(name: str) -> str:
    """Return transformers' name for a tensor: `module.h.0.ln_1.gamma` is `transformer.h.0.ln_1.weight`."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    for old, new in _OLD_ENDINGS.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    name = name.replace("lm_head.decoder.", "lm_head.")
    return f"transformer.{name}" if name.startswith(("wte.", "wpe.", "h.", "ln_f.")) else name


def shape_of(weights: dict[str, Any], path: str, what: str) -> Gpt2Shape:
    """Return the shape that the tensors have; raises UserError where they are of something else."""
    shape = gpt2_shape({name: tuple(tensor.shape) for name, tensor in weights.items()})
    if shape is None:
        raise UserError(
            f"{what} {path!r} holds {len(weights):,} tensors, but not those of a GPT-2 (no {EMBEDDING}, "
            f"{', '.join(list(weights)[:3])}...)"
        )
    return shape


def config_of(weights: dict[str, Any], path: str, what: str) -> Any:
    """Return transformers' configuration of the GPT-2 that the tensors are of; raises UserError."""
    from transformers import GPT2Config

    shape = shape_of(weights, path, what)
    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        n_positions=shape.positions,
        vocab_size=shape.vocabulary,
    )
    config.tie_word_embeddings = HEAD not in weights
    return config


def _check(weights: dict[str, Any], path: str, what: str) -> None:
    """Compare with the tensors that a model of this shape has: none missing, none of another size, none left over."""
    import torch
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(config_of(weights, path, what))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} does not belong" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} is {found[name]}, {size} is needed"
            for name, size in expected.items()
            if found.get(name, size) != size
        ),
    ]
    if problems:
        raise UserError(
            f"{what} {path!r} is not whole: {len(problems):,} of the tensors of {shape_of(weights, path, what)} are "
            "wrong: " + "; ".join(problems[:5])
        )
