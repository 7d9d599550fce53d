"""A merged block in memory, with the very values that the plan's task will write; for walks that
go on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import log

import torch

from moetool.data import JsonObject
from moetool.forward.block import Block
from moetool.forward.stats import LayerStats
from moetool.kernels import codec, merge
from moetool.methods.reduce.decision import Decision


@dataclass(frozen=True)
class Rule:
    """How a cluster becomes one: `how` as kernels/merge.py takes it, which router row it gets, and
    the dtype in which the new expert is stored. `held`: what is left of a new expert's matrices
    when they are stored, where that is not only their rounding to `dtype`.
    """

    how: JsonObject
    router: str
    dtype: str
    held: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None


def merged_block(
    block: Block, decision: Decision, rule: Rule, stats: LayerStats | None = None
) -> Block:
    """Experts of each group combined in float64 and rounded to the stored dtype, router rows as
    --router says. `stats`: where inputs are whitened.
    """
    new = block.with_experts(decision.leads)
    made = replace(
        new.experts,
        gate_up=new.experts.gate_up.clone(),
        down=new.experts.down.clone(),
        gate_up_bias=_copy(new.experts.gate_up_bias),
        down_bias=_copy(new.experts.down_bias),
    )
    rows, bias = new.router.clone(), _copy(new.bias)
    for j, group in enumerate(decision.groups):
        if len(group) == 1:
            continue
        expert = _combined(block, decision, j, rule, stats)
        for role, value in (rule.held(expert) if rule.held else expert).items():
            getattr(made, role)[j] = value.to(codec.torch_dtype(rule.dtype)).to(made.down.dtype)
        if rule.router == "centroid":
            continue
        weights = decision.weight(j)
        rows[j] = merge.sum_of([block.router[e] for e in group], weights).to(rows.dtype)
        if bias is not None and block.bias is not None:
            more = log(len(group)) if rule.router == "logsumexp" else 0.0
            bias[j] = merge.sum_of([block.bias[e] for e in group], weights) + more
    return replace(new, experts=made, router=rows, bias=bias)


def _combined(
    block: Block, decision: Decision, number: int, rule: Rule, stats: LayerStats | None
) -> dict[str, torch.Tensor]:
    """One merged expert, float64."""
    group = decision.groups[number]
    members = [merge.permuted(_parts(block, e), decision.orders.get(e)) for e in group]
    seen = _covariances(stats, group, members[0]["down"]) if rule.how.get("whiten") else ()
    return merge.combined(members, decision.weight(number), rule.how, *seen)


def _covariances(
    stats: LayerStats | None, group: tuple[int, ...], like: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of what gate_up and down see, where the matrices are."""
    assert stats is not None
    inner, inside = stats.in_cov, [stats.mid_cov[e] for e in group]
    here = [torch.from_numpy(c).to(like.device) for c in (inner, *inside)]
    return here[:1], here[1:]


def _parts(block: Block, expert: int) -> dict[str, torch.Tensor]:
    e = block.experts
    found = {"gate_up": e.gate_up[expert], "down": e.down[expert]}
    found |= {
        r: getattr(e, r)[expert] for r in ("gate_up_bias", "down_bias") if getattr(e, r) is not None
    }
    return found


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()
