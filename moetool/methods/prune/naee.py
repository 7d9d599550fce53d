"""Try what each choice would do to the layer's output."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

from moetool.methods.prune.way import PruneWay
from moetool.methods.reduce.way import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.forward.block import Block
    from moetool.methods.reduce.view import View

HELD = 512 << 20  # bytes of all experts' outputs on the sample; more tokens are left out
MOST = 300  # subsets tried one by one; beyond that experts go one at a time


class Naee(PruneWay):
    """NAEE (arXiv 2402.14800): the subset whose layer output is nearest the full layer's on a
    sample of tokens, routing computed anew. Every subset where there are at most 300 (8 -> 6 is
    28); otherwise greedy: again and again the expert goes whose loss costs least.
    """

    name = "naee"
    needs = Needs(sample=True, buffers=HELD + (HELD >> 1))

    def keep(self, view: View, count: int) -> list[int]:
        trial = Trial(
            view.some(min(view.eye.sample, HELD // (4 * view.experts * view.rows.shape[1]))),
            view.block,
        )
        if (
            view.mixture.groups == 1
            and comb(view.experts - len(view.protected), view.experts - count) <= MOST
        ):
            free = [e for e in range(view.experts) if e not in view.protected]
            sets = [
                sorted({*view.protected, *chosen})
                for chosen in combinations(free, count - len(view.protected))
            ]
            return min(sets, key=lambda s: (float(trial.errors(s).sum()), s))
        return self._greedy(view, trial, count)

    @staticmethod
    def _greedy(view: View, trial: Trial, count: int) -> list[int]:
        kept = list(range(view.experts))
        members = view.groups()
        while len(kept) > count:
            for group in members:  # one from each router group in turn, so that groups stay equal
                if len(kept) <= count:
                    break
                cost = {
                    e: trial.cost(kept, e) for e in kept if e in group and e not in view.protected
                }
                gone = min(cost, key=lambda e: (cost[e], e))
                kept.remove(gone)
                trial.now = None
        return kept


class Trial:
    """The layer with some experts missing, on a sample x [tokens, hidden]; all experts' outputs
    are computed once.
    """

    def __init__(self, x: Tensor, block: Block) -> None:
        import torch

        self.block, self.x = block, x.to(block.router.device)
        self.on_input = block.law.score == "sigmoid-on-input"
        gate = block.route(self.x).scores if self.on_input else None
        everyone = block.experts.count + block.zero_experts
        self.out = torch.empty(len(x), everyone, x.shape[1], device=self.x.device)
        for e in range(block.experts.count):
            self.out[:, e] = block.experts.out(
                block.experts.hidden(self.x if gate is None else self.x * gate[:, e : e + 1], e), e
            )
        self.out[:, block.experts.count :] = self.x[:, None]
        self.full = self._mix(slice(None), list(range(block.experts.count)))[0]
        self.now: tuple[Tensor, Tensor] | None = None

    def _mix(self, rows: slice | Tensor, kept: list[int]) -> tuple[Tensor, Tensor]:
        """(output, chosen experts) of these tokens with only these experts."""
        import torch

        from moetool.kernels import moe

        allowed = torch.zeros(self.out.shape[1], dtype=torch.bool, device=self.x.device)
        allowed[[*kept, *range(self.block.experts.count, self.out.shape[1])]] = True
        routing = moe.select(
            self.x[rows], self.block.router, self.block.law, self.block.bias, allowed
        )
        chosen = self.out[rows].gather(
            1, routing.index[..., None].expand(-1, -1, self.out.shape[-1])
        )
        return (chosen if self.on_input else chosen * routing.weight[..., None]).sum(
            1
        ), routing.index

    def errors(self, kept: list[int]) -> Tensor:
        """Squared distance from the full layer's output, [tokens]."""
        return (self._mix(slice(None), kept)[0] - self.full).pow(2).sum(-1).double()

    def cost(self, kept: list[int], expert: int) -> float:
        """How much the error grows when this one goes too: only tokens that chose it change (with
        groups all may).
        """
        if self.now is None:
            made, index = self._mix(slice(None), kept)
            self.now = ((made - self.full).pow(2).sum(-1).double(), index)
        before, index = self.now
        hit = (index >= 0).any(1) if self.block.law.groups > 1 else (index == expert).any(1)
        if not bool(hit.any()):
            return 0.0
        made, _ = self._mix(hit, [e for e in kept if e != expert])
        return float((made - self.full[hit]).pow(2).sum(-1).double().sum() - before[hit].sum())
