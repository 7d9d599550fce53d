"""How many experts each layer keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moetool.errors import UsageError
from moetool.methods.reduce.counts import check_count
from moetool.surgery.experts import Mixture

if TYPE_CHECKING:
    import numpy as np


def uniform(mixture: Mixture, ratio: float) -> int:
    """Experts a layer keeps when `ratio` of them go: floor(experts * ratio) are removed; with
    groups, as many in each (rounded).

    The floor and the rounding are llm-compressor's (modifiers/pruning/reap/base.py). Raises for
    fewer than a token needs.
    """
    if not 0.0 <= ratio < 1.0:
        raise UsageError(
            "--ratio is the share of experts removed",
            expected="0 <= ratio < 1, for example 0.25",
            found=ratio,
            hint="0.25 turns 128 experts into 96",
        )
    removed = int(mixture.experts * ratio + 1e-9)
    if mixture.groups > 1:
        asked, removed = removed, round(removed / mixture.groups) * mixture.groups
        if asked and not removed:
            raise UsageError(
                "the groups of a group-limited router must stay equal, and that leaves nothing to remove",
                expected=f"--ratio at least {mixture.groups / mixture.experts:g}: one expert from each of {mixture.groups} groups",
                found=ratio,
                hint="raise --ratio",
            )
    check_count(mixture, mixture.experts - removed)
    return mixture.experts - removed


def across(
    mixture: Mixture, ratio: float, scores: Mapping[int, np.ndarray], budget: str
) -> dict[int, int]:
    """Experts each layer keeps when the same number goes altogether, but from where it is missed
    least: the smallest scores (high = needed) of the whole model go first, as long as the layer
    keeps what a token needs.

    By `sensitivity` scores are shares of their layer's sum (as in M-SMoE's global threshold, arXiv
    2310.01334, for any score); `global` compares them as they are, so that a layer whose experts
    all put out little may lose most of them.
    """
    total = (mixture.experts - uniform(mixture, ratio)) * len(scores)
    least = max(mixture.top_k, mixture.groups)
    kept = dict.fromkeys(scores, mixture.experts)
    shares: list[tuple[float, int, int]] = []
    for layer, row in scores.items():
        whole = max(1e-300, float(row.sum())) if budget == "sensitivity" else 1.0
        shares += [(float(s) / whole, layer, e) for e, s in enumerate(row.clip(min=0))]
    for _, layer, _ in sorted(shares):
        if not total:
            break
        if kept[layer] > least:
            kept[layer] -= 1
            total -= 1
    if mixture.groups > 1:
        kept = {
            layer: max(least, round(n / mixture.groups) * mixture.groups)
            for layer, n in kept.items()
        }
    return kept
