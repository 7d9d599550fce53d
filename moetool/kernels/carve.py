"""Cut one FFN matrix into the matrices of its experts, and make the copies differ.

A neuron is row j of gate and up and column j of down, so one function serves all three: `axis`
says where neurons lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moetool.kernels import draw

Tensor = torch.Tensor


@dataclass(frozen=True)
class Share:
    """Which neurons an expert holds: part (first + e) % parts of them, taken in `order`, which may
    have an order for each of several copies, one after another: then as many parts of each. `axis`
    says where neurons lie: 0 in [neurons, hidden], 1 in [hidden, neurons].
    """

    axis: int
    parts: int = 1
    order: Sequence[int] | None = None
    first: int = 0

    def differing(self, neurons: int) -> int:
        """How many experts hold different neurons, of an FFN of so many."""
        return self.parts * (1 if self.order is None else len(self.order) // neurons)


@dataclass(frozen=True)
class Variation:
    """What makes copies differ, and by which streams of random numbers. permute: the stream of
    orders; noise: its deviation, in units of the matrix's own; redraw: the share of neurons drawn
    anew; same: an index stream that gate, up and down share (whole neurons are re-drawn), None for
    an index set a matrix, as the reference code has it. `name`: the matrix. mask: the share of
    entries that become zero.
    """

    permute: str | None = None
    noise: float | None = None
    redraw: float | None = None
    same: str | None = None
    seed: int = 0
    name: str = ""
    mask: float | None = None

    @property
    def any(self) -> bool:
        changes = (self.permute, self.noise, self.redraw, self.mask)
        return any(change is not None for change in changes)


PLAIN = Variation()


def experts(
    matrix: Tensor, count: int, share: Share, change: Variation = PLAIN, scale: float = 1.0
) -> Iterator[Tensor]:
    """Yield `count` expert matrices of one FFN matrix. `scale` multiplies last. Arithmetic in
    float32 (float64 for float64 sources), one cast at the end.
    """
    held: dict[int, Tensor] = {}
    differing = share.differing(matrix.shape[share.axis])
    for number in range(count):
        expert = share.first + number
        part = expert % differing
        if not change.any and part in held:
            yield held[part]
            continue
        piece = _changed(_part(matrix, share, part), share.axis, change, scale, expert)
        if not change.any and share.parts > 1 and number + differing < count:
            held[part] = piece
        yield piece


def _changed(piece: Tensor, axis: int, change: Variation, scale: float, expert: int) -> Tensor:
    """Permuted, then drawn anew, then noise, then masked, then scale."""
    if change.permute is not None:
        stream = f"{change.permute}/{expert}/permute"
        order = draw.permutation(piece.shape[axis], change.seed, stream)
        piece = piece.index_select(axis, _index(order, piece))
    if not change.any and scale == 1.0:
        return piece
    wide = torch.float64 if piece.dtype == torch.float64 else torch.float32
    work = piece.to(wide, copy=True)  # changed in place below
    if change.redraw is not None:
        work = redrawn(work, axis, change, expert)
    if change.noise is not None:
        stream = f"{change.name}/{expert}/noise"
        work = noisy(work, change.noise, seed=change.seed, name=stream)
    if change.mask is not None:
        stream = f"{change.name}/{expert}/mask"
        work = masked(work, change.mask, seed=change.seed, name=stream)
    return work.mul_(scale).to(piece.dtype)


def _part(matrix: Tensor, share: Share, part: int) -> Tensor:
    width = matrix.shape[share.axis] // share.parts
    if share.order is None:
        return matrix.narrow(share.axis, part * width, width)
    mine = share.order[part * width : (part + 1) * width]
    index = torch.tensor(mine, dtype=torch.int64, device=matrix.device)
    return matrix.index_select(share.axis, index)


def _index(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)


def redrawn(work: Tensor, axis: int, change: Variation, expert: int) -> Tensor:
    """Re-draw (in place) floor(change.redraw * neurons) neurons from N(mean, std) of the entries
    they replace (Drop-Upcycling, arXiv 2502.19261).
    """
    neurons = work.shape[axis]
    count = int(neurons * (change.redraw or 0.0))
    if count == 0:
        return work
    stream = f"{change.same or change.name}/{expert}/redraw"
    chosen = _index(draw.permutation(neurons, change.seed, stream)[:count].copy(), work)
    old = work.index_select(axis, chosen)
    std = old.std(correction=0) if old.numel() else old.sum()
    mean = old.mean()
    fresh = _normal(old, change.seed, f"{change.name}/{expert}/values")
    return work.index_copy_(axis, chosen, fresh.mul_(std).add_(mean))


def noisy(work: Tensor, sigma: float, *, seed: int, name: str) -> Tensor:
    """Add (in place) N(0, (sigma * std of the matrix)^2) to every entry."""
    return work.add_(_normal(work, seed, name).mul_(sigma * work.std(correction=0)))


def masked(work: Tensor, share: float, *, seed: int, name: str) -> Tensor:
    """Make (in place) each entry zero with this probability (EvoMoE, arXiv 2112.14397)."""
    if work.is_meta:
        return work
    gone = draw.uniform(work.numel(), seed, name) < share
    return work.masked_fill_(_index(gone, work).reshape(work.shape), 0.0)


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
