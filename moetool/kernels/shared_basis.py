"""The experts of a layer as coefficients in one low-rank basis: how alike two experts are in the
directions that the layer uses, whatever order their neurons come in.

Neuron j of an expert is row j of gate and up, which read the hidden state, and column j of down,
which writes to it. The joint SVD of all experts' rows has their right singular vectors as its
basis, that of all columns their left ones; both come from Gram matrices [hidden, hidden].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moetool.kernels import cluster
from moetool.kernels.merge import leading
from moetool.kernels.moe import Experts

Tensor = torch.Tensor
BLOCK = 2048  # neurons matched at once: beyond it, blocks of neurons with like leading coefficients
STEP = 64  # neurons of all experts that are multiplied at once
LIBRARIES = 100 << 20  # scipy, scikit-learn and the workspace of LAPACK, measured
_ROUNDS = 2


class Basis(NamedTuple):
    """Orthonormal columns: of what rows of gate and up read [hidden, r], and of what columns of
    down write [hidden, s].
    """

    reads: Tensor
    writes: Tensor


def memory(experts: int, hidden: int, width: int) -> int:
    """Bytes that `points` holds beside the experts: two Gram matrices and what a decomposition
    needs, one expert and three experts' coefficients in float32, one matching, one step.
    """
    decomposed = 8 * 8 * hidden * hidden
    coefficients = 4 * 4 * 3 * width * hidden
    step = 2 * 4 * experts * STEP * 3 * hidden
    return LIBRARIES + decomposed + coefficients + 3 * 8 * min(width, BLOCK) ** 2 + step


def points(experts: Experts, energy: float) -> np.ndarray:
    """Points [experts, experts] float64 whose distances are those of the matched experts'
    coefficients, in a basis that keeps `energy` of the squared singular values.
    """
    shared = basis(experts, energy)
    made = gram(experts, shared, matched(experts, shared))
    return cluster.embed(np.asarray(made.cpu().numpy()))


def basis(experts: Experts, energy: float) -> Basis:
    """The leading directions of all experts together."""
    hidden, device = experts.down.shape[1], experts.down.device
    reads, writes = torch.zeros(2, hidden, hidden, dtype=torch.float64, device=device)
    for e in range(experts.count):
        rows = experts.gate_up[e].float()
        reads += rows.T @ rows
        columns = experts.down[e].float()
        writes += columns @ columns.T
    return Basis(leading(reads, energy).float(), leading(writes, energy).float())


def neurons(
    experts: Experts, expert: int, shared: Basis, some: Tensor | slice = slice(None)
) -> Tensor:
    """An expert's coefficients [width, d] float32, a row a neuron (or `some` of them): of gate
    (where it is gated), of up, of down, and the biases of the first two.
    """
    width, hidden = experts.down.shape[2], experts.down.shape[1]
    rows = experts.gate_up[expert].view(-1, width, hidden)[:, some].float() @ shared.reads
    parts = [*rows, experts.down[expert][:, some].float().T @ shared.writes]
    if experts.gate_up_bias is not None:
        parts.append(experts.gate_up_bias[expert].view(-1, width)[:, some].float().T)
    return torch.cat(parts, 1)


def matched(experts: Experts, shared: Basis) -> list[Tensor]:
    """For every expert the order [width] of its neurons that lies nearest the others': neuron
    order[j] goes where neuron j of the common expert is.

    The common expert is first the one of the largest down, then the mean of the experts as they
    were matched to it.
    """
    size = torch.stack([experts.down[e].float().norm() for e in range(experts.count)])
    common = neurons(experts, int(size.argmax()), shared)
    orders: list[Tensor] = []
    for _ in range(_ROUNDS):
        orders, total = [], torch.zeros_like(common)
        for e in range(experts.count):
            mine = neurons(experts, e, shared)
            orders.append(order(common, mine))
            total += mine[orders[-1]]
        common = total / experts.count
    return orders


def order(common: Tensor, mine: Tensor) -> Tensor:
    """Neuron order[j] of `mine` goes where neuron j of `common` is; both [width, d]. The largest
    sum of inner products (Hungarian, scipy) where there are at most BLOCK neurons, else within
    blocks of neurons ordered by their leading coefficient.
    """
    from scipy.optimize import linear_sum_assignment

    width = len(common)
    blocks = -(-width // BLOCK)
    here, there = (x[:, 0].argsort(stable=True).tensor_split(blocks) for x in (common, mine))
    made = torch.empty(width, dtype=torch.int64, device=mine.device)
    for ours, theirs in zip(here, there, strict=True):
        likeness = (common[ours] @ mine[theirs].T).double().cpu().numpy()
        rows, columns = linear_sum_assignment(likeness, maximize=True)
        made[ours[rows]] = theirs[columns]
    return made


def gram(experts: Experts, shared: Basis, orders: list[Tensor]) -> Tensor:
    """Inner products [experts, experts] of the experts' coefficients, neurons in these orders,
    float64 sums; biases of down count as they are.
    """
    count, width = experts.count, experts.down.shape[2]
    total = torch.zeros(count, count, dtype=torch.float64, device=experts.down.device)
    for start in range(0, width, STEP):
        some = [o[start : start + STEP] for o in orders]
        mine = [neurons(experts, e, shared, part) for e, part in enumerate(some)]
        flat = torch.stack(mine).flatten(1)
        total += flat @ flat.T
    if experts.down_bias is not None:
        total += experts.down_bias.double() @ experts.down_bias.double().T
    return total
