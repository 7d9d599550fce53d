"""Experts that are one and the same, byte for byte: they are merged before any others, since that
changes no weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Sequence

from moetool.methods.reduce.view import View
from moetool.surgery import forms
from moetool.surgery.checkpoint import read_range

HEAD = 4096  # bytes of each matrix that are looked at first
CHUNK = 16 << 20


def found(view: View, experts: Sequence[int]) -> list[list[int]]:
    """Those of a layer's experts that are alike, in groups of two or more. Most are told apart by
    the first bytes of their matrices; all of what is left is read.
    """
    near = _alike(experts, lambda e: _seal(view, e, HEAD))
    same: list[list[int]] = []
    for group in near:
        same += _alike(group, lambda e: _seal(view, e, None))
    return same


def together(classes: Iterable[Sequence[int]], gone: int) -> dict[int, list[int]]:
    """{who stays: all that it stands for} of classes of equal experts, with at most `gone` fewer."""
    joined: dict[int, list[int]] = {}
    for same in classes:
        taken = same[: gone + 1]
        gone -= len(taken) - 1
        if len(taken) > 1:
            joined[taken[0]] = list(taken)
    return joined


def _alike(experts: Sequence[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    by_key: dict[Hashable, list[int]] = {}
    for expert in experts:
        by_key.setdefault(key(expert), []).append(expert)
    return [group for group in by_key.values() if len(group) > 1]


def _seal(view: View, expert: int, most: int | None) -> bytes:
    """Of an expert's matrices as they lie, or of the first bytes of each."""
    source, seal = view.mixture.source, hashlib.sha256()
    for role, piece in sorted(view.mixture.pieces(view.layer, expert).items()):
        parts, how = forms.split(source.tensor(piece.name), piece)
        seal.update(json.dumps([role, how], sort_keys=True).encode())
        for part in parts:
            path, start, count = source.range_of(part)
            stop = start + (count if most is None else min(count, most))
            for at in range(start, stop, CHUNK):
                seal.update(read_range(path, at, min(CHUNK, stop - at)))
    return seal.digest()
