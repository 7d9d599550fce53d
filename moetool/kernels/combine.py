"""Combine tensors entry by entry, in float64 sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights[i] * tensors[i], all of one shape and dtype; a lone weight of 1 gives that
    tensor bit for bit.
    """
    kept = [(t, w) for t, w in zip(tensors, weights, strict=True) if w != 0.0]
    if len(kept) == 1 and kept[0][1] == 1.0:
        return kept[0][0]
    total = torch.zeros(tensors[0].shape, dtype=torch.float64, device=tensors[0].device)
    for tensor, weight in kept:
        total.add_(tensor.to(torch.float64), alpha=weight)
    return total.to(tensors[0].dtype)


def affine(tensor: Tensor, scale: float, shift: float) -> Tensor:
    """tensor * scale + shift, in float32 at least; folding a norm's (1 + w) is shift 1."""
    work = tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return (work * scale + shift).to(tensor.dtype)


def reindex(ids: Tensor, to: Sequence[int], experts: int) -> Tensor:
    """Expert ids [tokens, top_k] after experts went: `to[old]` is the new id. Where two ids of a
    token become one, the later takes the next id that the token does not have yet, so that a token
    keeps top_k different experts.
    """
    if ids.is_meta:
        return torch.empty_like(ids)
    made = torch.tensor(to, dtype=ids.dtype, device=ids.device)[ids.long()]
    for slot in range(1, made.shape[1]):
        for _ in range(experts):
            clash = (made[:, :slot] == made[:, slot : slot + 1]).any(1)
            if not bool(clash.any()):
                break
            made[clash, slot] = (made[clash, slot] + 1) % experts
    return made
