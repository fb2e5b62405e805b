"""Permutations that are the same on every machine and in every version of the libraries."""

import hashlib

import numpy as np

from dialogpt_ds.files import canonical_json

ORDER_VERSION = 1
"""Raised whenever the order that a seed gives changes; kept in checkpoints, so that a resume never mixes two orders."""


def permutation(count: int, *key: str | int) -> np.ndarray:
    """Return a permutation of 0 to `count` - 1 that depends on `key` alone, [count] int64.

    It sorts raw 64-bit numbers of the Philox 4x64 counter generator (Salmon et al. 2011), keyed with a hash of `key`.
    NumPy keeps those raw numbers fixed; what its Generator makes of them (such as `permutation`) may change by version.
    """
    digest = hashlib.sha256(canonical_json([ORDER_VERSION, *key]).encode("utf-8")).digest()
    words = np.frombuffer(digest, np.dtype("<u8"))
    generator = np.random.Philox(key=words[:2], counter=np.array([0, 0, words[2], words[3]], np.uint64))
    return np.argsort(generator.random_raw(count), kind="stable")
