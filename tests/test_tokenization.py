"""Tokenizers: GPT-2's without a hub, the fast encoder's equality, and the checksum that tells vocabularies apart."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dialogpt_ds.errors import UserError
from dialogpt_ds.tokenization import _plain_encoder, find_tokenizer, make_encoder, vocabulary_sha256

GPT2 = find_tokenizer("gpt2")
FAST, PLAIN = make_encoder(GPT2), _plain_encoder(GPT2)


def test_gpt2_comes_whole_without_a_hub() -> None:
    assert len(GPT2) == 50_257
    assert GPT2.eos_token_id == 50_256
    assert FAST("Hello there") == [15_496, 612]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_the_fast_encoder_gives_the_tokenizers_ids(text: str) -> None:
    assert FAST(text) == PLAIN(text)
    assert GPT2.decode(FAST(text), clean_up_tokenization_spaces=False) == text


def test_gpt2_is_encoded_by_the_fast_encoder() -> None:
    assert "tiktoken" in type(FAST.__self__).__module__  # type: ignore[attr-defined]


def test_a_tokenizer_saved_and_loaded_has_the_same_checksum(tmp_path: Path) -> None:
    GPT2.save_pretrained(str(tmp_path))
    assert vocabulary_sha256(find_tokenizer(str(tmp_path))) == vocabulary_sha256(GPT2)


def test_another_vocabulary_has_another_checksum_and_its_own_encoder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(str(tmp_path))
    tokenizer = find_tokenizer(str(tmp_path))
    assert vocabulary_sha256(tokenizer) != vocabulary_sha256(GPT2)
    assert make_encoder(tokenizer)("b a c") == [2, 1, 3]


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="has no EOS token"):
        find_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no tokenizer"):
        find_tokenizer(str(tmp_path))
