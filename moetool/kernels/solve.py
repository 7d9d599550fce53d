"""Solve for weights: least squares on what a MoE layer puts out."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetool.kernels.moe import Experts, Law, Routing

Tensor = torch.Tensor
RIDGE = 0.01  # damping of a step
SWEEPS = 3


class Refit(NamedTuple):
    """New down matrices [experts, hidden, width] (float32), and the relative squared error of the
    layer's output before and after.
    """

    down: Tensor
    before: float
    after: float


class _Work(NamedTuple):
    """An expert's tokens, and what its down matrix sees of them, gates included [tokens, width]."""

    expert: int
    rows: Tensor
    h: Tensor


def refit(x: Tensor, routing: Routing, experts: Experts, law: Law, target: Tensor) -> Refit:
    """Down matrices that bring the layer's output nearest to `target` [tokens, hidden] on x
    [tokens, hidden].

    Minimises sum |target - sum_e w_e D_e h_e|^2 over all D_e by block Gauss-Seidel: one expert at
    a time against what the others leave, each step damped by RIDGE (in units of the mean energy of
    h_e). Many sweeps reach the joint least-squares solution; few stay near the old matrices where
    the text says little. One expert for each cluster with fixed gates is MergeMoE's least squares
    (arXiv 2510.14436). Normal equations in float64.
    """
    down, left = experts.down.float().clone(), target.clone()
    work = _work(x, routing, experts, law, left)
    for expert in range(experts.count, routing.scores.shape[1]):  # zero experts: not ours to change
        token, slot = torch.where(routing.index == expert)
        left.index_add_(0, token, x[token] * routing.weight[token, slot][:, None], alpha=-1)
    energy = float(target.double().pow(2).sum().clamp_min(1e-300))
    before = float(left.double().pow(2).sum()) / energy
    factors = [_factor(w.h, RIDGE) for w in work]
    for _ in range(SWEEPS):
        for (expert, rows, h), factor in zip(work, factors, strict=True):
            step = torch.cholesky_solve((h.T @ left[rows]).double(), factor).to(down.dtype).T
            down[expert] += step
            left.index_add_(0, rows, h @ step.T, alpha=-1)
    return Refit(down, before, float(left.double().pow(2).sum()) / energy)


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


def _factor(h: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of h'h + ridge, float64; the ridge grows until the matrix is positive
    definite.
    """
    gram = (h.T @ h).double()
    scale = gram.diagonal().mean().clamp_min(1e-30)
    for grow in (1.0, 10.0, 100.0, 1e4):
        factor: Tensor
        factor, bad = torch.linalg.cholesky_ex(
            gram
            + ridge * grow * scale * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        )
        if not int(bad):
            return factor
    raise ArithmeticError("the activations are not finite")
