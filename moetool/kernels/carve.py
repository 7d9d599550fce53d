"""Cut one FFN matrix into the matrices of its experts, and make the copies differ.

A neuron is row j of gate and up and column j of down, so one function serves all three: `axis` says where neurons lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moetool.kernels import draw

Tensor = torch.Tensor


def experts(
    matrix: Tensor, shapes: Sequence[tuple[int, ...]], *, axis: int, parts: int = 1, order: list[int] | None = None, first: int = 0,
    scale: float = 1.0, permute: str | None = None, noise: dict[str, Any] | None = None, redraw: dict[str, Any] | None = None, seed: int = 0, name: str = "",
) -> Iterator[Tensor]:  # fmt: skip
    """Yield len(shapes) expert matrices; expert e holds part (first+e) % parts of the neurons, taken in `order`.

    matrix [neurons, hidden] for axis 0, [hidden, neurons] for axis 1. `permute`, `noise` and `redraw` name per-expert
    streams of random numbers; `scale` multiplies last. Arithmetic in float32 (float64 for float64 sources), one cast at the end.
    """
    width = matrix.shape[axis] // parts
    plain = permute is None and noise is None and redraw is None
    held: dict[int, Tensor] = {}
    for number in range(len(shapes)):
        expert = first + number
        part = expert % parts
        if plain and part in held:
            yield held[part]
            continue
        piece = _part(matrix, axis, part, width, order)
        if permute is not None:
            piece = piece.index_select(axis, _index(draw.permutation(width, seed, f"{permute}/{expert}/permute"), piece))
        if not plain or scale != 1.0:
            work = piece.to(torch.float64 if piece.dtype == torch.float64 else torch.float32)
            if redraw is not None:
                work = redrawn(work, axis, **redraw, seed=seed, name=name, expert=expert)
            if noise is not None:
                work = noisy(work, noise["sigma"], seed=seed, name=f"{name}/{expert}/noise")
            piece = (work * scale).to(matrix.dtype)
        if plain and parts > 1:
            held[part] = piece
        yield piece


def _part(matrix: Tensor, axis: int, part: int, width: int, order: list[int] | None) -> Tensor:
    if order is None:
        return matrix.narrow(axis, part * width, width)
    return matrix.index_select(axis, torch.tensor(order[part * width : (part + 1) * width], dtype=torch.int64, device=matrix.device))


def _index(values: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)


def redrawn(work: Tensor, axis: int, *, ratio: float, same: str | None, seed: int, name: str, expert: int) -> Tensor:
    """Re-draw floor(ratio * neurons) neurons from N(mean, std) of the entries they replace (Drop-Upcycling, arXiv 2502.19261).

    `same` names an index stream shared by gate, up and down (whole neurons are re-drawn); None draws an index set for each
    matrix, as the reference code does.
    """
    neurons = work.shape[axis]
    count = int(neurons * ratio)
    if count == 0:
        return work
    chosen = _index(draw.permutation(neurons, seed, f"{same or name}/{expert}/redraw")[:count].copy(), work)
    old = work.index_select(axis, chosen)
    std = old.std(correction=0) if old.numel() else old.sum()
    fresh = _index(draw.normal(old.numel(), seed, f"{name}/{expert}/values"), work).to(work.dtype).reshape(old.shape)
    return work.index_copy(axis, chosen, fresh * std + old.mean())


def noisy(work: Tensor, sigma: float, *, seed: int, name: str) -> Tensor:
    """Add N(0, (sigma * std of the matrix)^2) to every entry."""
    fresh = _index(draw.normal(work.numel(), seed, name), work).to(work.dtype).reshape(work.shape)
    return work + fresh * (sigma * work.std(correction=0))
