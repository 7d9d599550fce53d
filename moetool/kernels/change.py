"""The difference of two matrices as a product of two thin ones."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def spectrum(change: Tensor) -> Tensor:
    """The squared singular values of a matrix, largest first [min(out, in)], float64."""
    wide = change.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values: Tensor = torch.linalg.eigvalsh((gram + gram.T) / 2)
    return values.flip(0).clamp_min(0)


def rank_for(values: Tensor, energy: float) -> int:
    """The least rank (at least 1) that keeps this share of the sum of squared singular values."""
    total = values.sum()
    if not total > 0:
        return 1
    kept = values.cumsum(0) / total
    return min(int((kept < energy).sum()) + 1, len(values))


def lost(values: Tensor, rank: int) -> float:
    """The error of the best approximation of this rank, relative (Frobenius)."""
    total = float(values.sum())
    return (float(values[rank:].sum()) / total) ** 0.5 if total > 0 else 0.0


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(a [rank, in], b [out, rank]), of equal norm in each direction, with b a nearest to a matrix
    [out, in] (Eckart-Young). float64; both are zero where there is no change.
    """
    wide = change.double()
    if wide.is_meta:
        return wide.new_empty(rank, wide.shape[1]), wide.new_empty(wide.shape[0], rank)
    if wide.shape[0] > wide.shape[1]:
        b, a = factors(wide.T, rank)
        return a.T, b.T
    gram = wide @ wide.T
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    basis = vectors[:, -rank:].flip(1)
    root = values[-rank:].flip(0).clamp_min(0).sqrt().sqrt()  # of the singular values
    turned = basis.T @ wide
    safe = torch.where(root > 0, root, torch.ones_like(root))
    return turned / safe[:, None] * (root > 0)[:, None], basis * root
