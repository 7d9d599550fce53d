"""Cut one FFN matrix into the matrices of its experts, and make the copies differ.

A neuron is row j of gate and up and column j of down, so one function serves all three: `axis`
says where neurons lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from moetool.kernels import draw

Tensor = torch.Tensor


def experts(
    matrix: Tensor,
    shapes: Sequence[tuple[int, ...]],
    *,
    axis: int,
    parts: int = 1,
    order: list[int] | None = None,
    first: int = 0,
    scale: float = 1.0,
    permute: str | None = None,
    noise: dict[str, Any] | None = None,
    redraw: dict[str, Any] | None = None,
    seed: int = 0,
    name: str = "",
) -> Iterator[Tensor]:
    """Yield len(shapes) expert matrices; expert e holds part (first+e) % parts of the neurons,
    taken in `order`.

    matrix [neurons, hidden] for axis 0, [hidden, neurons] for axis 1. `permute`, `noise` and
    `redraw` name per-expert streams of random numbers; `scale` multiplies last. Arithmetic in
    float32 (float64 for float64 sources), one cast at the end.
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
            piece = piece.index_select(
                axis, _index(draw.permutation(width, seed, f"{permute}/{expert}/permute"), piece)
            )
        if not plain or scale != 1.0:
            work = piece.to(
                torch.float64 if piece.dtype == torch.float64 else torch.float32, copy=True
            )  # changed in place below
            if redraw is not None:
                work = redrawn(work, axis, **redraw, seed=seed, name=name, expert=expert)
            if noise is not None:
                work = noisy(work, noise["sigma"], seed=seed, name=f"{name}/{expert}/noise")
            piece = work.mul_(scale).to(matrix.dtype)
        if plain and parts > 1:
            held[part] = piece
        yield piece


def _part(matrix: Tensor, axis: int, part: int, width: int, order: list[int] | None) -> Tensor:
    if order is None:
        return matrix.narrow(axis, part * width, width)
    return matrix.index_select(
        axis,
        torch.tensor(
            order[part * width : (part + 1) * width], dtype=torch.int64, device=matrix.device
        ),
    )


def _index(values: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)


def redrawn(
    work: Tensor, axis: int, *, ratio: float, same: str | None, seed: int, name: str, expert: int
) -> Tensor:
    """Re-draw (in place) floor(ratio * neurons) neurons from N(mean, std) of the entries they
    replace (Drop-Upcycling, arXiv 2502.19261).

    `same` names an index stream shared by gate, up and down (whole neurons are re-drawn); None
    draws an index set for each matrix, as the reference code does.
    """
    neurons = work.shape[axis]
    count = int(neurons * ratio)
    if count == 0:
        return work
    chosen = _index(
        draw.permutation(neurons, seed, f"{same or name}/{expert}/redraw")[:count].copy(), work
    )
    old = work.index_select(axis, chosen)
    std = old.std(correction=0) if old.numel() else old.sum()
    mean = old.mean()
    fresh = _normal(old, seed, f"{name}/{expert}/values")
    return work.index_copy_(axis, chosen, fresh.mul_(std).add_(mean))


def noisy(work: Tensor, sigma: float, *, seed: int, name: str) -> Tensor:
    """Add (in place) N(0, (sigma * std of the matrix)^2) to every entry."""
    return work.add_(_normal(work, seed, name).mul_(sigma * work.std(correction=0)))


def _normal(like: Tensor, seed: int, name: str) -> Tensor:
    """Standard normal values of the same shape and dtype; on the meta device nothing is drawn."""
    if like.is_meta:
        return torch.empty_like(like)
    return (
        torch.from_numpy(
            draw.normal(
                like.numel(), seed, name, np.float64 if like.dtype == torch.float64 else np.float32
            )
        )
        .to(like.device)
        .reshape(like.shape)
    )
