"""The loss that keeps routers from sending all tokens to few experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Scores:
    """What a router said in one forward pass: logits [tokens, choices], and what was chosen of
    them [tokens, k].
    """

    logits: Tensor
    chosen: Tensor


def of_layer(scores: Scores, kept: Tensor | None = None) -> Tensor:
    """choices * sum over e of f_e P_e: f_e the part of all choices that fell on e, P_e its mean
    probability (Fedus et al., arXiv 2101.03961). 1 where tokens spread evenly, whatever k is.
    `kept`: which tokens count [tokens], bool.
    """
    shares = scores.logits.float().softmax(-1)
    chosen, count = scores.chosen, shares.shape[-1]
    if kept is not None:
        shares, chosen = shares[kept], chosen[kept]
    fell = torch.bincount(chosen.flatten(), minlength=count).to(shares)
    return count * (fell / fell.sum().clamp(min=1) * shares.mean(0)).sum()


def mean(seen: Sequence[Scores], mask: Tensor | None = None) -> Tensor | None:
    """The mean over layers: a collapse in one layer shows, which a pool of all layers' counts (as
    stock mixtures have it) hides, and the coefficient means the same at any depth. `mask`: 0 for
    padding [batch, length].
    """
    if not seen:
        return None
    kept = mask.flatten().bool() if mask is not None and mask.dim() == 2 else None
    fits = kept is not None and all(len(s.logits) == len(kept) for s in seen)
    each = [of_layer(s, kept if fits else None).to(seen[0].logits.device) for s in seen]
    return torch.stack(each).mean()
