"""What experts are compared by: points whose distances say how unlike two experts are."""

from __future__ import annotations

import numpy as np
import torch

from moetool.forward import profiler
from moetool.forward.block import Block
from moetool.kernels import cluster, moe, shared_basis
from moetool.methods.reduce.view import View

_CHUNK = 1 << 22


def points(kind: str, view: View, energy: float) -> np.ndarray:
    """[experts, d] float64. Distances between rows are Euclidean distances of: outputs on the
    sample, outputs of unit length (`cosine`: the mean over tokens of the cosine), mean outputs,
    router rows, router logits of unit length (columns over the sample), all weights, or (`svd`)
    coefficients in a shared basis that keeps this share of the squared singular values.
    """
    if kind == "router":
        return view.rows
    if kind == "weights":
        return cluster.embed(weight_gram(view.block))
    if kind == "svd":
        return shared_basis.points(view.block.experts, energy)
    if kind == "router-logits":
        return cluster.embed(logit_cosine(view))
    if kind == "mean-outputs":
        return np.asarray(_dense(view)["mean"])
    if kind == "outputs-and-logits":
        return cluster.embed(
            0.5 * ((_dense(view)["cosine"] + 1) / 2 + (logit_cosine(view) + 1) / 2)
        )
    return cluster.embed(_dense(view)["gram" if kind == "outputs" else "cosine"])


def _dense(view: View) -> dict[str, np.ndarray]:
    """Pairwise statistics of all experts' outputs: kept by the profile, or made from its sample."""
    if view.seen.has("gram"):
        return {k: view.seen.arrays[k] for k in ("gram", "cosine", "mean")}
    return profiler.dense(view.sampled.to(view.block.router.device), view.block)


def logit_cosine(view: View) -> np.ndarray:
    """Cosine of the experts' router logits over the sample [experts, experts] (M-SMoE, REAM)."""
    logits = view.sampled.double().cpu().numpy() @ view.rows.T
    unit = logits / np.maximum(np.linalg.norm(logits, axis=0), 1e-30)
    return np.asarray(unit.T @ unit)


def weight_gram(block: Block) -> np.ndarray:
    """Inner products of the experts' weights [experts, experts], float64 sums over chunks."""
    experts = block.experts
    total = torch.zeros(experts.count, experts.count, dtype=torch.float64)
    for tensor in (experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias):
        if tensor is None:
            continue
        flat = tensor.reshape(experts.count, -1)
        for start in range(0, flat.shape[1], max(1, _CHUNK // experts.count)):
            part = flat[:, start : start + max(1, _CHUNK // experts.count)].double()
            total += (part @ part.T).cpu()
    return np.asarray(total.numpy())


def cross_cosine(first: View, second: View) -> np.ndarray:
    """Mean cosine of outputs on the same tokens for the experts of two layers together, [2 *
    experts, 2 * experts] (Sub-MoE).
    """
    count, total = first.experts, None
    x, y = first.sampled, second.sampled
    step = max(1, (64 << 20) // (8 * count * x.shape[1]))
    for start in range(0, len(x), step):
        outs = torch.cat(
            [
                moe.every(x[start : start + step], first.block.experts),
                moe.every(y[start : start + step], second.block.experts),
            ]
        ).transpose(0, 1)
        unit = torch.nn.functional.normalize(outs, dim=-1)
        inner = (unit @ unit.transpose(1, 2)).sum(0).double()
        total = inner if total is None else total + inner
    assert total is not None
    return np.asarray((total / len(x)).cpu().numpy())
