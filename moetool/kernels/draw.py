"""Random numbers that depend only on (seed, name): same bytes on every machine, thread count and
output order.

Philox's raw 64-bit stream is fixed by its paper (Salmon et al., SC 2011) and by numpy's
compatibility promise for bit generators; what is made of it is made here, since numpy's own
distributions may change between versions.
"""

from __future__ import annotations

import hashlib
from math import pi, prod, sqrt

import numpy as np

_BLOCK = 1 << 16


def _stream(seed: int, name: str) -> np.random.Philox:
    return np.random.Philox(
        key=int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    )


def _open_unit(raw: np.ndarray) -> np.ndarray:
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def uniform(count: int, seed: int, name: str) -> np.ndarray:
    """float64 [count] in the open interval (0, 1)."""
    return _open_unit(_stream(seed, name).random_raw(count))


def normal(count: int, seed: int, name: str, dtype: type = np.float64) -> np.ndarray:
    """dtype [count], mean 0, variance 1: Box-Muller on blocks of 65,536 raw numbers, so that
    little more than the result is held.
    """
    stream = _stream(seed, name)
    out: np.ndarray = np.empty(count, dtype)
    for start in range(0, count, _BLOCK):
        u = _open_unit(stream.random_raw(_BLOCK))
        radius, angle = np.sqrt(-2.0 * np.log(u[: _BLOCK // 2])), 2.0 * pi * u[_BLOCK // 2 :]
        block = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        out[start : start + _BLOCK] = block[: count - start]
    return out


def permutation(count: int, seed: int, name: str) -> np.ndarray:
    """int64 [count]: 0..count-1 in random order."""
    return np.argsort(_stream(seed, name).random_raw(count), kind="stable")


def places(most: int, count: int, seed: int, name: str) -> np.ndarray:
    """int64 [count], ascending: so many different numbers below `most`."""
    stream, few = _stream(seed, name), min(count, most - count)
    taken = np.zeros(most, bool)
    while (missing := few - int(taken.sum())) > 0:
        taken[stream.random_raw(missing) % np.uint64(most)] = True
    return np.flatnonzero(taken if few == count else ~taken)


def matrix(
    shape: tuple[int, ...], *, law: str, seed: int, name: str, sigma: float = 0.0, repeat: int = 1
) -> np.ndarray:
    """A router [experts, hidden], float32: `normal` (sigma), `kaiming` (U(-1/sqrt(hidden),
    1/sqrt(hidden)), torch's Linear default), `centred` (uniform of std sigma, mean taken out;
    Drop-Upcycling's `torch_rand_002`). With `repeat` G each of the first experts/G rows stands G
    times in a row (virtual groups; Megatron-LM upcycling_utils).
    """
    rows = shape[0] // repeat
    count = rows * prod(shape[1:])
    if law == "normal":
        values = normal(count, seed, name) * sigma
    elif law == "kaiming":
        values = (2.0 * uniform(count, seed, name) - 1.0) / sqrt(shape[-1])
    elif law == "centred":
        values = uniform(count, seed, name)
        values = (values - values.mean()) * sigma * sqrt(12.0)
    else:
        raise ValueError(f"unknown router law {law!r}")
    return np.repeat(values.reshape(rows, *shape[1:]), repeat, axis=0).astype(np.float32)
