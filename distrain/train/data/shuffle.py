"""A permutation of N numbers that is computed where it is asked for, instead of being stored.

The order of a billion sequences must be known at any position, on every rank, after every restart, under every
version of numpy. A Feistel network permutes the numbers below 4^k whatever its round function is; stepping on until
the result lies below N restricts it to N numbers ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite
Domains, 2002). The domain is less than 4 N, so that takes less than four steps on average.
"""

import numpy as np
from numpy.typing import NDArray

from .tokenizer import Ids

ROUNDS = 6
Words = NDArray[np.uint64]


def shuffled(positions: Ids, *, size: int, seed: int, epoch: int) -> Ids:
    """Where each of ``positions`` (all in [0, size)) goes in the permutation of this seed and epoch."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(positions.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> Words:
    keys = np.arange(1, ROUNDS + 1, dtype=np.uint64)
    for word in (seed, epoch):
        keys = _mix(keys ^ _mix(np.array([word % 2**64], dtype=np.uint64)))
    return keys


def _feistel(values: Words, half_bits: int, keys: Words) -> Words:
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(words: Words) -> Words:
    """The finalizer of splitmix64: every bit of the input reaches every bit of the output."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
