"""Several experts into one, or into a base and small differences. Matrices come in canonical form
(kernels/form.py); sums are float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Tensor = torch.Tensor


def permuted(parts: Mapping[str, Tensor], order: Sequence[int] | None) -> dict[str, Tensor]:
    """An expert with its neurons in another order (the same function): row j of the result is row
    order[j] of the original.
    """
    if order is None:
        return dict(parts)
    index = torch.tensor(order, dtype=torch.int64, device=parts["down"].device)
    both = torch.cat([index, index + len(index)])
    made = {"gate_up": parts["gate_up"][both], "down": parts["down"][:, index]}
    if "gate_up_bias" in parts:
        made["gate_up_bias"] = parts["gate_up_bias"][both]
    return made | {r: parts[r] for r in ("down_bias",) if r in parts}


def mean(members: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i weights[i] * member i, float64."""
    return {role: sum_of([m[role] for m in members], weights) for role in members[0]}


def sum_of(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights[i] * tensors[i] in float64."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64, device=tensors[0].device)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(torch.float64), alpha=weight)
    return total


def ties(
    members: Sequence[Mapping[str, Tensor]], weights: Sequence[float], density: float
) -> dict[str, Tensor]:
    """TIES (arXiv 2306.01708) around the weighted mean: differences are trimmed to their largest
    `density`, the sign with the larger sum wins, and only differences of that sign are averaged.
    """
    made = {}
    for role in members[0]:
        base = sum_of([m[role] for m in members], weights)
        deltas = torch.stack(
            [
                _trim(m[role].to(torch.float64) - base, density) * w
                for m, w in zip(members, weights, strict=True)
            ]
        )
        sign = torch.sign(deltas.sum(0))
        agree = (torch.sign(deltas) == sign) & (sign != 0)
        share = torch.stack([torch.full_like(base, w) for w in weights])
        made[role] = base + (deltas * agree).sum(0) / (share * agree).sum(0).clamp_min(
            1e-12
        ) * agree.any(0)
    return made


def _trim(delta: Tensor, density: float) -> Tensor:
    kept = max(1, int(density * delta.numel()))
    if delta.is_meta or kept == delta.numel():
        return delta
    limit = delta.abs().flatten().kthvalue(delta.numel() - kept + 1).values
    return delta * (delta.abs() >= limit)


def union_svd(
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    energy: float,
    covariance: Sequence[Tensor] | None = None,
) -> Tensor:
    """Sub-MoE's union SVD (arXiv 2506.23266, eq. 5-12): matrices [out, in] share U, and their V
    are averaged. float64 [out, in].

    With [W_1 S_1, ..., W_k S_k] = U diag(s) [V_1..V_k]' (S S' = covariance, the whitening) and
    rank r the result is U_r U_r' sum_i w_i W_i: the weighted mean, projected onto the r leading
    left directions. Untruncated it *is* the weighted mean. U comes from the Gram matrix sum_i W_i
    cov_i W_i' [out, out]; r is the smallest that keeps `energy` of sum s^2.
    """
    average = sum_of(matrices, weights)
    if energy >= 1.0:
        return average
    gram = torch.zeros(
        average.shape[0], average.shape[0], dtype=torch.float64, device=average.device
    )
    for i, matrix in enumerate(matrices):
        wide = matrix.to(torch.float64)
        gram += (
            wide @ wide.T
            if covariance is None
            else wide @ covariance[i if len(covariance) > 1 else 0].to(torch.float64) @ wide.T
        )
    basis = leading(gram, energy)
    return basis @ (basis.T @ average)


def combined(
    members: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    how: Mapping[str, object],
    seen: Sequence[Tensor] | None = None,
    between: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """A cluster's one expert, float64. how: {how: mean | svd | ties, energy, density}; for a
    whitened svd the covariances of the inputs of gate and up (`seen`, one for all) and of down
    (`between`, one a member).
    """
    if how["how"] == "ties":
        return ties(members, weights, float(str(how["density"])))
    made = mean(members, weights)
    if how["how"] == "svd":
        energy, half = float(str(how["energy"])), members[0]["gate_up"].shape[0] // 2
        made["gate_up"] = torch.cat(
            [
                union_svd([m["gate_up"][part] for m in members], weights, energy, seen)
                for part in (slice(0, half), slice(half, None))
            ]
        )
        made["down"] = union_svd([m["down"] for m in members], weights, energy, between)
    return made


def leading(gram: Tensor, energy: float) -> Tensor:
    """Eigenvectors [n, r] of a Gram matrix [n, n] that together hold `energy` of its trace."""
    if gram.is_meta:
        return torch.empty_like(gram)
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    held = values.cumsum(0) / values.sum().clamp_min(1e-300)
    rank = int((held < energy).sum()) + 1
    basis: Tensor = vectors[:, : min(rank, len(values))]
    return basis


def low_rank(delta: Tensor, rank: int, covariance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(u [out, rank], v [rank, in]) with u v nearest to delta [out, in] on inputs of this
    covariance (SVD-LLM whitening, as in D2-MoE, arXiv 2502.17298).

    u is an orthonormal basis of the leading left directions of delta S (S S' = covariance); v = u'
    delta, so S is never inverted. float64.
    """
    wide = delta.to(torch.float64)
    if wide.is_meta:
        return wide.new_empty(wide.shape[0], rank), wide.new_empty(rank, wide.shape[1])
    gram = wide @ wide.T if covariance is None else wide @ covariance.to(torch.float64) @ wide.T
    _, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    basis = vectors[:, -rank:]
    return basis, basis.T @ wide


def wanda(matrix: Tensor, energy: Tensor, share: float) -> Tensor:
    """matrix [out, in] with the `share` of each row zeroed that matters least by |w| * sqrt(energy
    of its input) (arXiv 2306.11695). energy [in].
    """
    drop = int(matrix.shape[1] * share)
    if not drop or matrix.is_meta:
        return matrix
    score = matrix.double().abs() * energy.double().clamp_min(0).sqrt()[None, :]
    gone = score.argsort(dim=1, stable=True)[:, :drop]
    return matrix.scatter(1, gone, 0.0)
