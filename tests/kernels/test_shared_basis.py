"""Experts in a shared basis, against numpy's own SVD and brute force over all orders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moetool.kernels import cluster, shared_basis
from moetool.kernels.merge import permuted
from moetool.kernels.moe import Experts

HIDDEN, WIDTH, COUNT = 12, 5, 4


def layer(*, gated: bool = True, biases: bool = False, seed: int = 0) -> Experts:
    """A layer of random experts."""
    dice = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(COUNT, *shape, generator=dice)

    rows = WIDTH * (2 if gated else 1)
    held = (some(rows), some(HIDDEN)) if biases else (None, None)
    return Experts(some(rows, HIDDEN), some(HIDDEN, WIDTH), torch.relu, *held, gated)


def parts(experts: Experts, expert: int) -> list[np.ndarray]:
    """Gate, up (or up alone) and down, a row a neuron, float64."""
    stacked = experts.gate_up[expert].double().numpy()
    return [*np.split(stacked, len(stacked) // WIDTH), experts.down[expert].double().numpy().T]


def reference(experts: Experts, energy: float) -> list[np.ndarray]:
    """Coefficients [width, d] of each expert, from the SVD of all its rows under each other."""
    every = [parts(experts, e) for e in range(experts.count)]
    reads = np.concatenate([p for own in every for p in own[:-1]])
    writes = np.concatenate([own[-1] for own in every])
    bases = []
    for stack in (reads, writes):
        _, values, right = np.linalg.svd(stack)
        held = np.cumsum(values**2) / (values**2).sum()
        bases.append(right[: int(np.searchsorted(held, energy)) + 1].T)
    return [
        np.concatenate([*(p @ bases[0] for p in own[:-1]), own[-1] @ bases[1]], 1) for own in every
    ]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("energy", [0.4, 0.8])
def test_coefficients_are_those_of_a_joint_svd(gated: bool, energy: float) -> None:
    """Inner products of neurons tell bases alike that differ by signs."""
    experts = layer(gated=gated)
    shared = shared_basis.basis(experts, energy)
    for e, wanted in enumerate(reference(experts, energy)):
        made = shared_basis.neurons(experts, e, shared).double().numpy()
        assert made.shape == wanted.shape and made.shape[1] < 3 * HIDDEN
        np.testing.assert_allclose(made @ made.T, wanted @ wanted.T, atol=1e-4)


def test_matching_is_the_best_of_all_orders() -> None:
    one, other = torch.randn(2, WIDTH, 7, generator=torch.Generator().manual_seed(3))
    made = shared_basis.order(one, other)
    every = itertools.permutations(range(WIDTH))
    best = max(float((one * other[list(p)]).sum()) for p in every)
    assert float((one * other[made]).sum()) == pytest.approx(best, rel=1e-6)


def test_large_experts_are_matched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Still every neuron once, and one that was shuffled finds home."""
    monkeypatch.setattr(shared_basis, "BLOCK", 16)
    one = torch.randn(50, 9, generator=torch.Generator().manual_seed(4))
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(5))
    made = shared_basis.order(one, one[shuffled])
    assert (one[shuffled][made] == one).all()


@pytest.mark.parametrize("biases", [False, True])
def test_points_do_not_know_the_order_of_neurons(biases: bool) -> None:
    """An expert and its copy with shuffled neurons are one point; at full energy the distances of
    experts whose neurons are in order are those of their weights.
    """
    plain = layer(biases=biases)
    order = [3, 0, 4, 1, 2]
    roles = [
        r for r in ("gate_up", "down", "gate_up_bias", "down_bias") if getattr(plain, r) is not None
    ]
    copy = permuted({r: getattr(plain, r)[1] for r in roles}, order)
    stacked = {r: torch.cat([getattr(plain, r), copy[r][None]]) for r in roles}
    points = shared_basis.points(Experts(act=torch.relu, **stacked), 0.7)
    apart = cluster.distances(points)
    assert apart[1, COUNT] < 1e-3 < 0.2 * apart[0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_that_of_the_matched_weights(dtype: torch.dtype) -> None:
    """Against float64 inner products of the weights in the orders that were found."""
    base = layer(biases=True)
    experts = Experts(
        base.gate_up.to(dtype),
        base.down.to(dtype),
        torch.relu,
        base.gate_up_bias.to(dtype) if base.gate_up_bias is not None else None,
        base.down_bias.to(dtype) if base.down_bias is not None else None,
    )
    shared = shared_basis.basis(experts, 1.0)
    orders = shared_basis.matched(experts, shared)
    flat = []
    for e, order in enumerate(orders):
        own = {
            r: getattr(experts, r)[e].double()
            for r in ("gate_up", "down", "gate_up_bias", "down_bias")
        }
        flat.append(torch.cat([t.reshape(-1) for t in permuted(own, order.tolist()).values()]))
    wanted = torch.stack(flat) @ torch.stack(flat).T
    made = shared_basis.gram(experts, shared, orders)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-4)
