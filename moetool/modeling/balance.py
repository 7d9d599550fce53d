"""The loss that keeps routers from sending all tokens to few experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

Tensor = torch.Tensor


@dataclass(frozen=True)
class Scores:
    """What a router said in one forward pass: logits [tokens, choices], and what was chosen of
    them [tokens, k], -1 for nobody; `shares`: what makes of the logits what
    each choice has (None: a softmax; not computed in the layer, which may run again without it);
    `part`: the number of the router that each token has [tokens], where there are several;
    `likely`: logits by which each token alone foresees who takes it [tokens, choices]; `straight`:
    whether what is counted has the gradient of the shares.
    """

    logits: Tensor
    chosen: Tensor
    shares: Callable[[Tensor], Tensor] | None = None
    part: Tensor | None = None
    likely: Tensor | None = None
    straight: bool = False


def of_layer(scores: Scores, kept: Tensor | None = None) -> Tensor | None:
    """choices * sum over e of f_e P_e: f_e the part of all choices that fell on e, P_e its mean
    probability (Fedus et al., arXiv 2101.03961). 1 where tokens spread evenly, whatever k is; each
    router of its own tokens, and among what they may use (MoIIE, arXiv 2508.09779), the mean of
    these; None where no token had a choice. Where tokens foresee who takes them: the binary
    cross-entropy of that (MoMa, arXiv 2407.21770). `kept`: which tokens count [tokens], bool.
    """
    if scores.likely is not None:
        return _foreseen(scores.likely, scores.chosen, scores.logits, kept)
    share = scores.shares or _softmax
    shares = share(scores.logits)
    allowed = ~scores.logits.isneginf()
    part = scores.chosen.new_zeros(len(shares)) if scores.part is None else scores.part
    part = part.to(shares.device)
    if kept is not None:
        part = part.masked_fill(~kept.to(part.device), -1)
    mine = [part == number for number in sorted(set(part.tolist()) - {-1})]
    straight = scores.straight
    each = [_even(shares[at], scores.chosen[at], allowed[at], straight) for at in mine]
    found = [one for one in each if one is not None]
    return torch.stack(found).mean() if found else None


def _softmax(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1)


def _foreseen(likely: Tensor, chosen: Tensor, logits: Tensor, kept: Tensor | None) -> Tensor:
    """How wrong tokens are about who takes them, among those that may."""
    count = logits.shape[-1]
    taken = functional.one_hot(chosen + 1, count + 1).sum(1)[:, 1:]
    may = ~logits.isneginf()
    if kept is not None:
        may = may & kept.to(may.device)[:, None]
    wrong = functional.binary_cross_entropy_with_logits
    return wrong(likely.float()[may], taken.float()[may])


def _even(shares: Tensor, chosen: Tensor, allowed: Tensor, straight: bool) -> Tensor | None:
    """The loss of one router's tokens."""
    count = int(allowed.any(0).sum())
    if count < 2:
        return None
    fell = torch.bincount(chosen[chosen >= 0], minlength=shares.shape[-1]).to(shares)
    total = fell.sum().clamp(min=1)
    fell = fell + (shares - shares.detach()).sum(0) if straight else fell
    return count * (fell / total * shares.mean(0)).sum()


def mean(seen: Sequence[Scores], mask: Tensor | None = None) -> Tensor | None:
    """The mean over layers: a collapse in one layer shows, which a pool of all layers' counts (as
    stock mixtures have it) hides, and the coefficient means the same at any depth. `mask`: 0 for
    padding [batch, length].
    """
    kept = mask.flatten().bool() if mask is not None and mask.dim() == 2 else None
    fits = kept is not None and all(len(s.logits) == len(kept) for s in seen)
    made = [of_layer(s, kept if fits else None) for s in seen]
    each = [one.to(seen[0].logits.device) for one in made if one is not None]
    return torch.stack(each).mean() if each else None


def alike(logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Router logits [tokens, experts] of all layers as wide as the widest, by experts that nobody
    chooses: trainers that ask a backbone (TRL) put those of all layers into one balance loss.
    """
    widest = max((one.shape[-1] for one in logits), default=0)
    pad = functional.pad
    return tuple(pad(one, (0, widest - one.shape[-1]), value=-torch.inf) for one in logits)
