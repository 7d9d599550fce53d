"""Bring the neurons of a cluster's members into the order of its lead before they are averaged
(Hungarian matching, scipy).
"""

from __future__ import annotations

import numpy as np
import torch

from moetool.kernels.moe import Experts
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.view import View

_TOKENS = 1024


def orders(kind: str, view: View, decision: Decision) -> dict[int, tuple[int, ...]]:
    """For every member that is not a lead the order of its neurons: neuron order[j] of the member
    goes where the lead's neuron j is.

    weights: greatest sum of inner products of gate, up and down (MC-SMoE, permutation.py);
    activations: greatest correlation of what down_proj sees.
    """
    if kind == "none":
        return {}
    made = {}
    for lead, *members in decision.groups:
        for member in members:
            made[member] = tuple(order(kind, view, lead, member))
    return made


def order(kind: str, view: View, lead: int, member: int) -> list[int]:
    """The member's neurons in the lead's order."""
    from scipy.optimize import linear_sum_assignment

    likeness = (
        _by_weights(view.block.experts, lead, member)
        if kind == "weights"
        else _by_activations(view, lead, member)
    )
    rows, columns = linear_sum_assignment(-likeness)
    return [int(c) for c in columns[np.argsort(rows)]]


def _by_weights(experts: Experts, lead: int, member: int) -> np.ndarray:
    """[width, width] inner products of the lead's neurons with the member's."""
    half = experts.gate_up.shape[1] // 2
    a, b = experts.gate_up[lead].double(), experts.gate_up[member].double()
    made = (
        a[:half] @ b[:half].T
        + a[half:] @ b[half:].T
        + experts.down[lead].double().T @ experts.down[member].double()
    )
    return np.asarray(made.cpu().numpy())


def _by_activations(view: View, lead: int, member: int) -> np.ndarray:
    """[width, width] correlations of the lead's activations with the member's on the sample."""
    x = view.some(_TOKENS).to(view.block.router.device)

    def unit(expert: int) -> torch.Tensor:
        h = view.block.experts.hidden(x, expert).double()
        h = h - h.mean(0)
        made: torch.Tensor = h / h.norm(dim=0).clamp_min(1e-30)
        return made

    return np.asarray((unit(lead).T @ unit(member)).cpu().numpy())
