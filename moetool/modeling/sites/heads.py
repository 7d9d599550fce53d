"""The heads of a layer's attention: some always work, of the others each token has its own (MoH,
arXiv 2410.11842). What a head gives is weighted before the last projection; everything else is the
stock attention's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetool.modeling.block import Deep, Grouped
from moetool.modeling.laws.law import CombineLaw
from moetool.modeling.sites.site import GroupSite, wrong
from moetool.modeling.step_block import swapped
from moetool.surgery.groups import PART, Group


class GroupedHeads(Deep):
    """An attention module whose heads are one group of experts."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, each head weighted for each token."""
        (query, out), asked = self.linears.names, list[Tensor]()

        def queries(x: Tensor) -> Tensor:
            asked.append(getattr(self, query)(x))
            return asked[-1]

        def last(x: Tensor) -> Tensor:
            gates = self.gates(*self.held[0], hidden_states, asked[-1])
            heads = x.view(*gates.shape, -1) * gates.unsqueeze(-1)
            made: Tensor = getattr(self, out)(heads.view(x.shape))
            return made

        stands = {self.paths[query]: queries, self.paths[out]: last}
        return swapped(self, stands)(hidden_states, *args, **kwargs)

    def gates(self, group: Group, law: CombineLaw, x: Tensor, queries: Tensor) -> Tensor:
        """The weight of each head [..., heads] for x [..., hidden] and its queries."""
        shared, tokens = int(group.params.get("shared", 0)), x.reshape(-1, x.shape[-1])
        looked = tokens
        if "heads" in getattr(self, group.router).sites:
            each = queries.view(len(tokens), shared + group.experts, -1)
            looked = each[:, shared:].float().norm(dim=-1).to(x.dtype)
        routed = self.picked(group, law, looked).dense(group.experts, x)
        if group.scale != 1.0:
            routed = routed * group.scale
        gates = torch.cat((x.new_ones(len(tokens), shared), routed), -1)
        return gates.view(*x.shape[:-1], -1)


class HeadsSite(GroupSite):
    """One group of heads."""

    name = "heads"
    kind = GroupedHeads
    forms = (PART,)

    def check(self, module: Grouped, group: Group) -> None:
        super().check(module, group)
        (query, out), lie = module.linears.names, module.linears.shapes
        heads = int(group.params.get("shared", 0)) + group.experts
        size = getattr(module, "head_dim", None)
        if not lie[query][0] == lie[out][1] == heads * (size or lie[out][1] // heads):
            raise wrong(
                "heads of a group that are not the attention's",
                f"{lie[out][1] // (size or 1)} heads, those that are shared among them",
                str(heads),
            )
