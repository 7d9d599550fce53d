"""Solve for weights: least squares on what a MoE layer puts out."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetool.kernels.moe import Experts, Law, Routing

Tensor = torch.Tensor
RIDGE = 0.01  # damping of a step
SHRINK = 1.0  # pull towards the matrices as they were, times width / tokens
SWEEPS = 5
ROWS = 8192  # tokens whose products are summed in float32
STACK = 64 << 20  # bytes of matrices that are factored at once


class Refit(NamedTuple):
    """New down matrices [experts, hidden, width] (float32), and the relative squared error of the
    layer's output before and after. `few`: experts that saw fewer tokens than they are wide.
    """

    down: Tensor
    before: float
    after: float
    few: int = 0


class _Work(NamedTuple):
    """An expert's tokens, and what its down matrix sees of them, gates included [tokens, width]."""

    expert: int
    rows: Tensor
    h: Tensor


class _Pull(NamedTuple):
    """How an expert's step is found: the Cholesky factor of its damped normal equations, float32,
    and the weight of its old matrix in them.
    """

    factor: Tensor
    back: float


def refit(x: Tensor, routing: Routing, experts: Experts, law: Law, target: Tensor) -> Refit:
    """Down matrices that bring the layer's output nearest to `target` [tokens, hidden] on x
    [tokens, hidden].

    Minimises sum |target - sum_e w_e D_e h_e|^2 + sum_e s_e |D_e - D_e as it was|^2 over all D_e,
    s_e = SHRINK width / tokens of e, in units of the mean energy of h_e: a prior whose weight does
    not grow with the text, so an expert that saw fewer tokens than it is wide stays near what it
    was (without it such a layer is ruined: tests/bench/measured.md). By block Gauss-Seidel, one
    expert at a time against what the others leave, each step damped by RIDGE in the same units.
    One expert for each cluster with fixed gates is MergeMoE's least squares (arXiv 2510.14436).
    Products in float32, summed and factored in float64.
    """
    down, left = experts.down.float().clone(), target.clone()
    work = _work(x, routing, experts, law, left)
    for expert in range(experts.count, routing.scores.shape[1]):  # zero experts: not ours to change
        token, slot = torch.where(routing.index == expert)
        left.index_add_(0, token, x[token] * routing.weight[token, slot][:, None], alpha=-1)
    energy = float(target.double().pow(2).sum().clamp_min(1e-300))
    before = float(left.double().pow(2).sum()) / energy
    pulls = _pulls([w.h for w in work])
    for _ in range(SWEEPS):
        for (expert, rows, h), pull in zip(work, pulls, strict=True):
            wanted = h.T @ left[rows]
            if pull.back:
                moved = down[expert] - experts.down[expert].float()
                wanted -= pull.back * moved.T
            step = torch.cholesky_solve(wanted, pull.factor).T
            down[expert] += step
            left.index_add_(0, rows, h @ step.T, alpha=-1)
    few = experts.count - sum(len(w.h) >= w.h.shape[1] for w in work)
    return Refit(down, before, float(left.double().pow(2).sum()) / energy, few)


def _work(x: Tensor, routing: Routing, experts: Experts, law: Law, left: Tensor) -> list[_Work]:
    """What each expert sees; its output of now is taken from `left`."""
    flat = routing.index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts.count)[: experts.count].tolist()
    on_input = law.score == "sigmoid-on-input"
    work, start = [], 0
    for expert, count in enumerate(counts):
        places = order[start : start + count]
        start += count
        if not count:
            continue
        rows = torch.div(places, routing.index.shape[1], rounding_mode="floor")
        weight = routing.weight.reshape(-1)[places][:, None]
        h = experts.hidden(x[rows] * weight if on_input else x[rows], expert)
        out = experts.out(h, expert)
        left.index_add_(0, rows, out if on_input else out * weight, alpha=-1)
        work.append(_Work(expert, rows, h if on_input else h * weight))
    return work


def _pulls(seen: list[Tensor]) -> list[_Pull]:
    """One for each expert, of what its down matrix sees [tokens, width]; factored as stacks of at
    most STACK bytes.
    """
    if not seen:
        return []
    width = seen[0].shape[1]
    size = max(1, STACK // (8 * width * width))
    pulls: list[_Pull] = []
    for start in range(0, len(seen), size):
        pulls += _stack(seen[start : start + size])
    return pulls


def _stack(seen: list[Tensor]) -> list[_Pull]:
    grams = torch.stack([_gram(h) for h in seen])
    scale = grams.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    tokens = torch.tensor([len(h) for h in seen], dtype=scale.dtype, device=scale.device)
    back = SHRINK * scale * grams.shape[1] / tokens
    for grow in (1.0, 10.0, 100.0, 1e4):
        damped = grams.clone()
        damped.diagonal(dim1=1, dim2=2).add_((RIDGE * grow * scale + back)[:, None])
        factors, bad = torch.linalg.cholesky_ex(damped)
        if not int(bad.max()):
            return [_Pull(f.float(), b) for f, b in zip(factors, back.tolist(), strict=True)]
    raise ArithmeticError("the activations are not finite")


def _gram(h: Tensor) -> Tensor:
    """h'h in float64, of products in float32."""
    total = torch.zeros(h.shape[1], h.shape[1], dtype=torch.float64, device=h.device)
    for part in torch.split(h, ROWS):
        total += part.T @ part
    return total
