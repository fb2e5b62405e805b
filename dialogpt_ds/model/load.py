"""Where a model comes from: a preset, a local folder, DialoGPT's .pkl, or the hub."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dialogpt_ds.config.arguments import Attention
from dialogpt_ds.errors import UserError
from dialogpt_ds.model.activation import fuse_activations
from dialogpt_ds.model.pkl import config_of, is_pkl, read_pkl, shape_of
from dialogpt_ds.model.presets import POSITIONS, PRESETS, VOCABULARY, Gpt2Shape, gpt2_shape
from dialogpt_ds.model.weight_files import shapes_in
from dialogpt_ds.tokenization import require_hub


@dataclass(frozen=True)
class ModelSource:
    """A model that was found but not built yet, so that everything about it can be checked first."""

    name: str
    config: Any
    """transformers' configuration, dropout already set."""
    weights: str | None
    """Folder, .pkl file or hub id with weights; None: random weights from the seed."""
    attention: Attention = "auto"

    @property
    def max_positions(self) -> int | None:
        """Longest row the model can take (tokens), None where it has no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def width(self) -> int:
        """Hidden size, the d of the noam schedule."""
        return self.config.hidden_size

    def shape(self) -> dict[str, Any]:
        """Return what decides the shapes of the weights, as a checkpoint keeps it."""
        names = (
            "model_type",
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "vocab_size",
            "max_position_embeddings",
        )
        return {name: getattr(self.config, name, None) for name in names}


def find_model(
    name: str, dropout: float, eos_id: int, vocabulary_size: int, attention: Attention = "auto"
) -> ModelSource:
    """Find a model by preset name, local folder, DialoGPT's .pkl file, or hub id.

    Args:
        name: what `--model` says.
        dropout: probability set everywhere in the model.
        eos_id: the shards' EOS, which becomes the model's.
        vocabulary_size: ids of the shards' tokenizer.
        attention: implementation of attention.

    Raises:
        UserError: it is nowhere, is no causal language model, or its vocabulary is too small for the shards.
    """
    if name.startswith("~"):
        name = str(Path(name).expanduser())
    if name in PRESETS:
        from transformers import GPT2Config

        shape = PRESETS[name]
        config: Any = GPT2Config(
            n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, n_positions=POSITIONS,
            vocab_size=max(VOCABULARY, vocabulary_size),
        )  # fmt: skip
        source = ModelSource(name, config, None, attention)
    elif is_pkl(name):
        source = ModelSource(name, config_of(read_pkl(name, "--model"), name, "--model"), name, attention)
    else:
        source = ModelSource(name, _config_of(name, "--model"), name, attention)
    if source.config.vocab_size < vocabulary_size:
        raise UserError(
            f"--model {name!r} has {source.config.vocab_size:,} token ids, the shards were made with "
            f"{vocabulary_size:,}: take the model that belongs to their tokenizer, or make the shards with the model's "
            "(--tokenizer)"
        )
    set_dropout(source.config, dropout)
    source.config.eos_token_id = source.config.bos_token_id = eos_id
    source.config.use_cache = True
    return source


def _config_of(name: str, what: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError):
            presets = ", ".join(PRESETS)
            require_hub(f"{what} {name!r} is no preset ({presets}), no local folder, and not in the hub's cache")
            try:
                config = AutoConfig.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise UserError(f"{what} {name!r} could not be loaded from the hub: {error}") from error
    else:
        try:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{what} {name!r} is a folder without a model's config.json that transformers knows: {error}"
            ) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{what} {name!r} is a {config.model_type!r} model, which is no causal language model")
    return config


def set_dropout(config: Any, probability: float) -> None:
    """Set every dropout of a configuration; Hugging Face's GPT-2 has 0.1 everywhere, DialoGPT trained with none."""
    for name in list(vars(config)):
        if name.endswith(("pdrop", "dropout", "dropout_prob")) and isinstance(getattr(config, name), (int, float)):
            setattr(config, name, probability)


def check_init_checkpoint(name: str, source: ModelSource) -> None:
    """Check that `--init_checkpoint` names a .pkl file or a folder with a model, of the shape that `source` has; raises
    UserError."""
    what = "--init_checkpoint"
    if is_pkl(name):
        _check_shape(shape_of(read_pkl(name, what), name, what), source, name)
        return
    if not Path(name).expanduser().is_dir():
        raise UserError(
            f"{what} {name!r} is no folder with a Hugging Face model (such as output_dir/model), and no .pkl file"
        )
    _config_of(name, what)


def build_model(source: ModelSource, init_checkpoint: str | None) -> Any:
    """Build the model in fp32 on the CPU; weights from `init_checkpoint`, else from the source, else from the random
    seed.

    Raises:
        UserError: the weights do not fit the shape; names the tensors.
    """
    model = _built(source, init_checkpoint)
    fuse_activations(model)
    return model


def _built(source: ModelSource, init_checkpoint: str | None) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    weights = str(Path(init_checkpoint).expanduser()) if init_checkpoint else source.weights
    if weights is None:
        return _from_config(source)
    if is_pkl(weights):
        return _from_pkl(source, weights, "--init_checkpoint" if init_checkpoint else "--model")
    try:
        shape = gpt2_shape(_shapes_in(Path(weights))) if source.config.model_type == "gpt2" else None
        if shape is not None:
            _check_shape(shape, source, weights)
        # Strict about shapes, and about what is missing: a head that starts at random would look like a model that
        # forgot.
        model, info = AutoModelForCausalLM.from_pretrained(
            weights, config=source.config, dtype=torch.float32, output_loading_info=True, **_attention_of(source)
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"the weights in {weights!r} do not fit model {source.name!r}: {_shortened(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"the weights in {weights!r} lack {len(missing)} tensors of model {source.name!r}: {', '.join(missing[:5])}"
        )
    return model


def _attention_of(source: ModelSource) -> dict[str, Any]:
    # varlen is set where the engine is started: what the model is asked before runs on the CPU.
    return {} if source.attention in ("auto", "varlen") else {"attn_implementation": source.attention}


def _from_config(source: ModelSource) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(source.config, dtype=torch.float32, **_attention_of(source))


def _from_pkl(source: ModelSource, path: str, what: str) -> Any:
    weights = read_pkl(path, what)
    _check_shape(shape_of(weights, path, what), source, path)
    model = _from_config(source)
    model.load_state_dict(weights, strict=False)  # read_pkl has compared the names; a tied head has none of its own
    model.tie_weights()
    return model


def _check_shape(found: Gpt2Shape, source: ModelSource, weights: str) -> None:
    """Refuse weights of another size than the model's, and name the right one; raises UserError."""
    config = source.config
    if config.model_type == "gpt2":
        wanted = Gpt2Shape(config.n_layer, config.n_embd, config.n_positions, config.vocab_size)
        if found == wanted:
            return
        is_own = weights == source.weights
        says = f"the config.json beside them says {wanted}" if is_own else f"--model {source.name!r} is {wanted}"
    else:
        is_own, says = False, f"--model {source.name!r} is a {config.model_type!r} model"
    if is_own:
        way_out = "put the config.json that belongs to them there"
    elif found.preset and found.positions == POSITIONS:
        way_out = f"give --model {found.preset}"
    else:
        way_out = "name the weights with --model, which takes their shape, instead of --init_checkpoint"
    raise UserError(f"the weights in {weights!r} do not fit: they are of {found}, {says}; {way_out}")


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a folder's tensors, from its safetensors files, else from its .bin; nothing where it has
    neither."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model.bin"))
    return {name: shape for file in files for name, shape in shapes_in(file).items()}


def _shortened(error: Exception) -> str:
    """Return the beginning of a message: transformers tells of each tensor that does not fit, which can be a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])[:600] + (f" ... ({len(lines):,} lines)" if len(lines) > 4 else "")
