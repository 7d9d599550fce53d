"""The attention of a layer: experts are its projections, whole.

`mix: projections` (the usual): each token is projected by its own experts, and what they make of
all tokens goes through one stock attention with one cache (Mixture-of-Transformers, arXiv
2411.04996; Mono-InternVL-1.5, arXiv 2507.12566). `mix: outputs`: every expert attends by itself,
and their outputs are weighted for each token (BAM, arXiv 2408.08274): one stock attention again,
with the heads of all experts beside each other; its cache holds the keys and values of them all,
or once where experts share these.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moetool.modeling import experts
from moetool.modeling.block import Deep, FfnLinears, Grouped, Picked
from moetool.modeling.experts.adding import AddingExperts
from moetool.modeling.experts.gate import GateExperts
from moetool.modeling.sites.around import Around, surround
from moetool.modeling.sites.projections import GroupedProjections, ProjectionExperts
from moetool.modeling.sites.site import GroupSite, wrong
from moetool.modeling.step_block import swapped
from moetool.surgery.groups import Group


class GroupedAttention(Deep, GroupedProjections):
    """An attention module with groups of experts: one at most stands for its projections, others
    add to what goes into these, or to what comes out.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, with what each token's experts project and add."""
        x, lie = hidden_states.reshape(-1, hidden_states.shape[-1]), hidden_states.shape[:-1]
        stands, around = dict[str, Any](), list[Around]()
        for group, law in self.held:
            picked = self.picked(group, law, x, lie)
            if group.base == "beside":
                around.append(Around(getattr(self, group.name), picked, group.scale))
            else:
                stands = self.projected(group, picked, x)
        surround(self, self.own_into, stands, around)
        paths = {self.paths.get(name, name): one for name, one in stands.items()}
        return swapped(self, paths)(hidden_states, *args, **kwargs)

    @property
    def own_into(self) -> tuple[str, ...]:
        """The linears that see the module's own tokens."""
        return self.linears.into

    def projected(self, group: Group, picked: Picked, x: Tensor) -> dict[str, Any]:
        """What stands for projections of the tokens x [tokens, hidden], by name."""
        experts = getattr(self, group.name)
        if isinstance(experts, GateExperts):
            value = self.linears.into[-1]
            return {value: partial(_gated, experts, picked, getattr(self, value))}
        if group.params.get("mix") == "outputs":
            return dict(_Heads(self, group, picked.dense(group.choices, x)).swapped())
        return {name: partial(self.mixed, name, picked) for name in self.linears.names}


def _gated(experts: GateExperts, picked: Picked, values: nn.Module, x: Tensor) -> Tensor:
    """The values of x [..., hidden], gated."""
    made: Tensor = values(x)
    rows, flat = x.reshape(-1, x.shape[-1]), made.reshape(-1, made.shape[-1])
    return experts.gated(rows, flat, picked).view(made.shape)


class _Heads:
    """The heads of all experts as those of one attention. Experts of their own keys and values lie
    one after the other; where they share these, the queries of all experts that look at one key
    head lie beside each other, as grouped-query attention has them.
    """

    def __init__(self, block: GroupedAttention, group: Group, weight: Tensor) -> None:
        self.block, self.experts, self.weight = block, group.choices, weight
        lie, size = block.linears, int(getattr(block, "head_dim"))  # noqa: B009
        query, key = lie.names[0], lie.names[1]
        self.size, self.pairs = size, lie.shapes[key][0] // size
        self.each = lie.shapes[query][0] // size // self.pairs
        self.shares = not group.has(key)

    def swapped(self) -> Mapping[str, Any]:
        """What the stock forward sees."""
        query, key, value = self.block.linears.into
        made: dict[str, Any] = {query: self.queries, self.block.linears.out: self.out}
        made["num_key_value_groups"] = self.each * (self.experts if self.shares else 1)
        if not self.shares:
            made |= {name: partial(self.beside, name) for name in (key, value)}
        return made

    def beside(self, name: str, x: Tensor) -> Tensor:
        """A projection by every expert [..., experts * out]."""
        return torch.cat([self.block.part(e, name)(x) for e in range(self.experts)], -1)

    def queries(self, x: Tensor) -> Tensor:
        made = self.beside(self.block.linears.names[0], x)
        return self._turned(made, self.experts, self.pairs) if self.shares else made

    def _turned(self, made: Tensor, first: int, second: int) -> Tensor:
        """[..., first, second, heads of a pair] -> [..., second, first, heads of a pair]."""
        lie: Tensor = made.view(*made.shape[:-1], first, second, self.each * self.size)
        return lie.transpose(-3, -2).reshape(made.shape)

    def out(self, x: Tensor) -> Tensor:
        """What all heads gave [..., experts * in] -> the weighted sum of the experts' outputs."""
        if self.shares:
            x = self._turned(x, self.pairs, self.experts)
        parts = x.view(*x.shape[:-1], self.experts, -1).unbind(-2)
        weights = self.weight.view(*x.shape[:-1], self.experts, 1).unbind(-2)
        made: list[Tensor] = []
        for expert, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            made.append(self.block.part(expert, self.block.linears.out)(part) * weight)
        return torch.stack(made).sum(0)


class AttentionSite(GroupSite):
    """One group of whole projections, or of gates on values, and what is added around them."""

    name = "attention"
    kind = GroupedAttention
    forms: ClassVar[tuple[str, ...]] = ("full", "gate", "adapter", "film")
    bases = ("member", "gone", "beside")

    def experts(self, group: Group, linears: FfnLinears) -> nn.Module:
        if group.form == "full":
            return ProjectionExperts(group, linears)
        return experts.forms()[group.form](group, linears)

    def check(self, module: Grouped, group: Group) -> None:
        super().check(module, group)
        names, outputs = module.linears.names, group.params.get("mix") == "outputs"
        form = experts.forms()[group.form]
        adds = issubclass(form, AddingExperts)
        if (group.base == "beside") != adds or (group.form == "gate" and group.base == "gone"):
            stands = "beside" if adds else "member"
            raise wrong(f"{group.form} experts {group.base!r} an attention", stands, group.base)
        if group.form == "gate":
            _check_values(module, int(group.params.get("heads", 0)))
        shared = [name for name in names if not group.has(name)]
        if group.form == "full" and shared and (not outputs or shared != [*names[1:3]]):
            raise wrong(
                "`targets` of experts at the site attention",
                f"{names[0]}, {names[-1]}, with mix outputs",
                str(group.params["targets"]),
            )
        if outputs:
            _check_heads(module)


def _check_values(module: Grouped, heads: int) -> None:
    """Refuse gates that are not those of the heads of its values."""
    lie = module.linears
    wide, size = lie.shapes[lie.into[-1]][0], getattr(module, "head_dim", None)
    if len(lie.names) != 4 or heads < 1 or wide % heads or size not in (None, wide // heads):
        raise wrong(
            "gates on values that are not the attention's",
            f"q, k, v and o, and values of {wide // (size or 1)} heads",
            f"{', '.join(lie.names)}, {heads} heads",
        )


def _check_heads(module: Grouped) -> None:
    """Refuse an attention that cannot have the heads of several beside each other."""
    lie, size = module.linears, getattr(module, "head_dim", None)
    wide = lie.shapes[lie.names[0]][0]
    norms = [n for n, p in module.named_parameters() if p.dim() == 1 and p.numel() == wide]
    norms = [n for n in norms if n.rpartition(".")[0] not in lie.names]
    if len(lie.names) != 4 or not isinstance(size, int) or norms:
        raise wrong(
            "experts whose outputs are mixed, at an attention whose heads do not stand alone",
            "q, k, v and o, and no norm over all heads",
            ", ".join((*lie.names, *norms)),
        )
