"""Merging, solving and clustering kernels against plain float64 references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moetool.kernels import cluster, combine, form, merge, moe, solve

torch.manual_seed(0)


def expert(width: int = 12, hidden: int = 10) -> dict[str, torch.Tensor]:
    return {"gate_up": torch.randn(2 * width, hidden), "down": torch.randn(hidden, width)}


def run(parts: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    gate, up = parts["gate_up"].double().chunk(2)
    return moe.ffn(x.double(), gate, up, parts["down"].double(), torch.nn.functional.silu)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_forms_go_there_and_back(transposed: bool, interleaved: bool) -> None:
    made = {**expert(), "gate_up_bias": torch.randn(24), "down_bias": torch.randn(10)}
    roles = ["gate_up", "gate_up_bias", "down", "down_bias"]
    stored = form.stored(made, roles, transposed=transposed, interleaved=interleaved)
    again = form.canonical(
        dict(zip(roles, stored, strict=True)), transposed=transposed, interleaved=interleaved
    )
    assert all(torch.equal(again[r], made[r]) for r in roles)
    single = form.canonical(
        dict(zip(("gate", "up", "down"), form.stored(made, ["gate", "up", "down"]), strict=True))
    )
    assert torch.equal(single["gate_up"], made["gate_up"])


def test_a_permuted_expert_is_the_same_function() -> None:
    parts, x = expert(), torch.randn(5, 10)
    moved = merge.permuted(parts, torch.randperm(12).tolist())
    assert not torch.equal(moved["down"], parts["down"])
    torch.testing.assert_close(run(moved, x), run(parts, x))


def test_identical_experts_merge_to_themselves() -> None:
    """Peers fail this: REAP's Sub-MoE gives 120 % error on two identical experts (reference, 0.2)."""
    parts = expert()
    for how in (
        {"how": "mean"},
        {"how": "svd", "energy": 1.0},
        {"how": "svd", "energy": 0.999999999},
        {"how": "ties", "density": 0.2},
    ):
        for count in (2, 4, 8):
            made = merge.combined([parts] * count, [1 / count] * count, how)
            for role in parts:
                torch.testing.assert_close(made[role].float(), parts[role], rtol=1e-5, atol=1e-5)


def exact_svd(
    matrices: list[np.ndarray],
    weights: list[float],
    energy: float,
    whitening: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Sub-MoE's equations as they stand: SVD of the concatenation, V averaged, U S V' truncated,
    whitening undone.
    """
    halves = (
        [np.linalg.cholesky(c) for c in whitening]
        if whitening
        else [np.eye(matrices[0].shape[1])] * len(matrices)
    )
    u, s, vt = np.linalg.svd(
        np.concatenate([w @ h for w, h in zip(matrices, halves, strict=True)], 1),
        full_matrices=False,
    )
    rank = int((np.cumsum(s**2) / (s**2).sum() < energy).sum()) + 1
    blocks = np.split(vt[:rank], len(matrices), axis=1)
    mean = sum(w * (b @ np.linalg.inv(h)) for w, b, h in zip(weights, blocks, halves, strict=True))
    return (u[:, :rank] * s[:rank]) @ mean


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("whitened", [False, True])
def test_union_svd_is_the_exact_one(energy: float, whitened: bool) -> None:
    dice = np.random.default_rng(1)
    matrices = [dice.standard_normal((9, 14)) for _ in range(3)]
    covariance = (
        [np.cov(dice.standard_normal((14, 40))) + 0.1 * np.eye(14) for _ in range(3)]
        if whitened
        else None
    )
    weights = [0.5, 0.3, 0.2]
    made = merge.union_svd(
        [torch.from_numpy(m) for m in matrices],
        weights,
        energy,
        [torch.from_numpy(c) for c in covariance] if covariance else None,
    )
    np.testing.assert_allclose(
        made.numpy(), exact_svd(matrices, weights, energy, covariance), rtol=1e-6, atol=1e-8
    )


def test_untruncated_union_svd_is_the_weighted_mean() -> None:
    """What is sold as SVD merging is averaging (reference, 0.1): the published equations without
    truncation, and ours.
    """
    dice = np.random.default_rng(2)
    matrices, weights = [dice.standard_normal((9, 14)) for _ in range(3)], [0.6, 0.3, 0.1]
    mean = sum(w * m for w, m in zip(weights, matrices, strict=True))
    np.testing.assert_allclose(exact_svd(matrices, weights, 2.0), mean, rtol=1e-5, atol=1e-8)
    for energy in (1.0, 1 - 1e-12):
        made = merge.union_svd([torch.from_numpy(m).float() for m in matrices], weights, energy)
        assert float((made - torch.from_numpy(mean)).norm() / np.linalg.norm(mean)) < 1e-5


def test_low_rank_is_the_best_there_is() -> None:
    dice = np.random.default_rng(3)
    delta, x = (
        dice.standard_normal((8, 11)),
        dice.standard_normal((11, 60)) * np.linspace(0.1, 3, 11)[:, None],
    )
    covariance = x @ x.T
    u, v = merge.low_rank(torch.from_numpy(delta), 3, torch.from_numpy(covariance))
    assert u.shape == (8, 3) and v.shape == (3, 11)
    half = np.linalg.cholesky(covariance)
    s = np.linalg.svd(delta @ half, compute_uv=False)
    error = np.linalg.norm((delta - (u @ v).numpy()) @ half) ** 2
    np.testing.assert_allclose(error, (s[3:] ** 2).sum(), rtol=1e-8)


def test_ties_is_what_its_paper_says() -> None:
    members, weights = [expert(4, 3) for _ in range(3)], [0.5, 0.25, 0.25]
    made = merge.ties(members, weights, 0.5)["down"]
    base = sum(w * m["down"].double() for w, m in zip(weights, members, strict=True))
    deltas = []
    for m in members:
        d = (m["down"].double() - base).flatten()
        limit = d.abs().sort(descending=True).values[int(0.5 * d.numel()) - 1]
        deltas.append(torch.where(d.abs() >= limit, d, 0.0))
    want = base.flatten().clone()
    for i in range(len(want)):
        total = sum(w * d[i] for w, d in zip(weights, deltas, strict=True))
        same = [
            (w, float(d[i]))
            for w, d in zip(weights, deltas, strict=True)
            if d[i] != 0 and np.sign(float(d[i])) == np.sign(float(total))
        ]
        if same:
            want[i] += sum(w * d for w, d in same) / sum(w for w, _ in same)
    torch.testing.assert_close(made.flatten(), want)


def test_wanda_zeroes_the_least_of_each_row() -> None:
    matrix, energy = torch.randn(5, 10), torch.rand(10)
    made = merge.wanda(matrix, energy, 0.3)
    score = matrix.abs() * energy.sqrt()
    for row in range(5):
        gone = (made[row] == 0).nonzero().flatten()
        assert len(gone) == 3 and set(gone.tolist()) == set(score[row].argsort()[:3].tolist())
    assert torch.equal(merge.wanda(matrix, energy, 0.0), matrix)


def layer(
    experts: int = 4, width: int = 6, hidden: int = 8, tokens: int = 200
) -> tuple[torch.Tensor, torch.Tensor, moe.Experts, moe.Law]:
    bank = moe.Experts(
        torch.randn(experts, 2 * width, hidden),
        torch.randn(experts, hidden, width),
        torch.nn.functional.silu,
    )
    return torch.randn(tokens, hidden), torch.randn(experts, hidden), bank, moe.Law(2)


def test_refit_reaches_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's lstsq over all down matrices of the layer at once."""
    x, router, bank, law = layer()
    routing = moe.select(x, router, law)
    target = torch.randn(200, 8)
    monkeypatch.setattr(solve, "RIDGE", 1e-9)
    monkeypatch.setattr(solve, "SHRINK", 0.0)
    monkeypatch.setattr(solve, "SWEEPS", 500)
    down, before, after, _ = solve.refit(x, routing, bank, law, target)
    weights = routing.dense().double()
    design = torch.cat(
        [weights[:, e : e + 1] * bank.hidden(x, e).double() for e in range(4)], 1
    ).numpy()
    best = np.linalg.lstsq(design, target.double().numpy(), rcond=None)[0]
    error = np.linalg.norm(design @ best - target.numpy()) ** 2 / float(
        target.double().pow(2).sum()
    )
    assert abs(after - error) < 1e-4 and after < before
    np.testing.assert_allclose(torch.cat(list(down), 1).T.numpy(), best, atol=2e-2)


def test_refit_leaves_what_is_right() -> None:
    x, router, bank, law = layer()
    routing = moe.select(x, router, law)
    down, before, *_ = solve.refit(x, routing, bank, law, moe.mix(x, routing, bank, law))
    torch.testing.assert_close(down, bank.down, rtol=1e-4, atol=1e-4)
    assert before < 1e-10


def test_refit_pulls_towards_what_was_as_tokens_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the ridge solution around the old matrices, solved at once in float64; `few` counts
    the experts with fewer tokens than they are wide.
    """
    x, router, bank, law = layer()
    x = x[:9]
    routing, target = moe.select(x, router, law), torch.randn(9, 8)
    monkeypatch.setattr(solve, "RIDGE", 1e-9)
    monkeypatch.setattr(solve, "SWEEPS", 2000)
    down, *_, few = solve.refit(x, routing, bank, law, target)
    weights = routing.dense().double()
    parts = [weights[:, e : e + 1] * bank.hidden(x, e).double() for e in range(4)]
    seen = [int((routing.index == e).sum()) for e in range(4)]
    width = bank.down.shape[2]
    assert few == sum(n < width for n in seen) > 0
    design = torch.cat(parts, 1)
    pull = torch.cat(
        [(p * p).sum() / n * torch.ones(width) for p, n in zip(parts, seen, strict=True)]
    )
    old = torch.cat(list(bank.down.double()), 1).T
    left = design.T @ (target.double() - design @ old)
    best = old + torch.linalg.solve(design.T @ design + torch.diag(pull), left)
    torch.testing.assert_close(torch.cat(list(down), 1).T.double(), best, atol=1e-3, rtol=1e-3)


def test_refit_of_an_unused_expert_keeps_it() -> None:
    x, router, bank, law = layer()
    router[3] = -100 * router[:3].abs().sum()
    x = x.abs()
    routing = moe.select(x, router, law)
    assert not (routing.index == 3).any()
    down, *_ = solve.refit(x, routing, bank, law, torch.randn(200, 8))
    assert torch.equal(down[3], bank.down[3])


@pytest.mark.parametrize("renorm", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_allowed_routes_as_if_the_others_were_not_there(score: str, renorm: bool) -> None:
    x, router = torch.randn(50, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    bias, law = torch.randn(6, dtype=torch.float64), moe.Law(2, score, renorm)
    keep = [0, 2, 3, 5]
    allowed = torch.zeros(6, dtype=torch.bool)
    allowed[keep] = True
    masked = moe.select(x, router, law, bias, allowed).dense()[:, keep]
    torch.testing.assert_close(masked, moe.select(x, router[keep], law, bias[keep]).dense())


def test_mix_is_the_plain_sum() -> None:
    x, router, bank, law = layer()
    routing = moe.select(x, router, law)
    plain = sum(routing.dense()[:, e : e + 1] * bank.out(bank.hidden(x, e), e) for e in range(4))
    seen: list[int] = []
    torch.testing.assert_close(
        moe.mix(x, routing, bank, law, lambda s: seen.append(len(s.rows))), plain
    )
    assert sum(seen) == 400


@pytest.mark.parametrize("linkage", ["average", "complete", "ward"])
def test_hierarchies_are_scikit_learns(linkage: str) -> None:
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import adjusted_rand_score

    points = np.random.default_rng(4).standard_normal((40, 5))
    made = cluster.agglomerative(cluster.distances(points), 7, linkage)
    assert (
        adjusted_rand_score(made, AgglomerativeClustering(7, linkage=linkage).fit_predict(points))
        == 1.0
    )
    assert (cluster.agglomerative(cluster.distances(points), 40, linkage) == np.arange(40)).all()


def test_embedding_keeps_distances() -> None:
    long = np.random.default_rng(5).standard_normal((12, 300))
    np.testing.assert_allclose(
        cluster.distances(cluster.embed(long @ long.T)), cluster.distances(long), atol=1e-6
    )


def test_kmeans_fills_every_cluster() -> None:
    points = np.repeat(np.eye(3), 4, axis=0)
    assert len(set(cluster.kmeans(points, 3, 0).tolist())) == 3
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # scikit-learn says that there are fewer distinct points than clusters
        assert len(set(cluster.kmeans(points, 5, 0).tolist())) == 5


def test_nearest_member_takes_the_first_of_twins() -> None:
    points = np.array([[0.0, 0], [1, 1], [1, 1], [9, 9]])
    assert (
        cluster.nearest_member(points, [1, 2]) == 1
        and cluster.nearest_member(points, [0, 1, 3]) == 1
    )


def test_reindex_keeps_a_tokens_experts_apart() -> None:
    made = combine.reindex(torch.tensor([[0, 1], [2, 3], [3, 1]]), [0, 0, 1, 1], 2)
    assert made.tolist() == [[0, 1], [1, 0], [1, 0]]
