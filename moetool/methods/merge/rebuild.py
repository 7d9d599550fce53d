"""A merged block in memory, with the very values that the plan's task will write; for walks that
go on with it.
"""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import torch

from moetool.forward.block import Block
from moetool.forward.stats import LayerStats
from moetool.kernels import codec, merge
from moetool.methods.reduce.decision import Layer
from moetool.surgery.experts import Mixture


def merged_block(
    block: Block,
    layer: Layer,
    how: dict[str, Any],
    number: int,
    router: str,
    stats: LayerStats | None,
    mixture: Mixture,
) -> Block:
    """Experts of each group combined in float64 and rounded to the stored dtype, router rows as
    --router says.
    """
    stored = codec.torch_dtype(
        mixture.source.tensor(mixture.pieces(number, layer.groups[0][0])["down"].name).dtype
    )
    new = block.with_experts(layer.leads)
    made = replace(
        new.experts,
        gate_up=new.experts.gate_up.clone(),
        down=new.experts.down.clone(),
        gate_up_bias=_copy(new.experts.gate_up_bias),
        down_bias=_copy(new.experts.down_bias),
    )
    rows, bias = new.router.clone(), _copy(new.bias)
    for j, group in enumerate(layer.groups):
        if len(group) == 1:
            continue
        weights = layer.weight(j)
        members = [merge.permuted(_parts(block, e), layer.orders.get(e)) for e in group]
        for role, value in merge.combined(
            members, weights, how, *(_covariances(stats, group) if how.get("whiten") else ())
        ).items():
            getattr(made, role)[j] = value.to(stored).to(made.down.dtype)
        if router != "centroid":
            rows[j] = merge.sum_of([block.router[e] for e in group], weights).to(rows.dtype)
            if bias is not None and block.bias is not None:
                bias[j] = merge.sum_of([block.bias[e] for e in group], weights) + (
                    log(len(group)) if router == "logsumexp" else 0.0
                )
    return replace(new, experts=made, router=rows, bias=bias)


def _covariances(stats: LayerStats | None, group: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    assert stats is not None
    return [torch.from_numpy(stats.in_cov)], [torch.from_numpy(stats.mid_cov[e]) for e in group]


def _parts(block: Block, expert: int) -> dict[str, Any]:
    e = block.experts
    found = {"gate_up": e.gate_up[expert], "down": e.down[expert]}
    found |= {
        r: getattr(e, r)[expert] for r in ("gate_up_bias", "down_bias") if getattr(e, r) is not None
    }
    return found


def _copy(tensor: Any) -> Any:
    return None if tensor is None else tensor.clone()
