"""A byte-level tokenizer and a GPT-2 of 35,000 parameters, so that even fp16 on a CPU takes seconds."""

from pathlib import Path
from typing import Any

from dialogpt_ds.preprocessing.make import ShardArguments, make_shards
from dialogpt_ds.tokenization import _byte_characters
from tests.conftest import write_tsv


def byte_tokenizer() -> Any:
    """Return a tokenizer with one id per byte, and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in _byte_characters().items()} | {"<eos>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_small_world(folder: Path) -> tuple[Path, Path]:
    """Write a model folder (with its tokenizer) and shards (train and validation) made with it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = folder / "small-model"
    config = GPT2Config(
        vocab_size=257, n_layer=2, n_embd=32, n_head=2, n_positions=128, bos_token_id=256, eos_token_id=256
    )
    GPT2LMHeadModel(config).save_pretrained(str(model))
    byte_tokenizer().save_pretrained(str(model))
    source = write_tsv(folder / "small.tsv", 400)
    make_shards(
        ShardArguments(
            [str(source)],
            output=str(folder / "shards"),
            tokenizer=str(model),
            max_seq_length=64,
            workers=1,
            validation_fraction=0.1,
        ),
        say=lambda _: None,
    )
    return model, folder / "shards"
