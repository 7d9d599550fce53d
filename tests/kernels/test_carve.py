"""Experts cut from an FFN: parts, copies and what makes copies differ, against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moetool.kernels import carve, draw

WIDTH, HIDDEN = 24, 10
MATRIX = torch.from_numpy(np.random.default_rng(7).standard_normal((WIDTH, HIDDEN))).float()


def cut(count: int, matrix: torch.Tensor = MATRIX, **options: object) -> list[torch.Tensor]:
    """`count` experts of a matrix whose rows are neurons."""
    scale = options.pop("scale", 1.0)
    shared = {k: v for k, v in options.items() if k in ("axis", "parts", "order", "first")}
    rest = {k: v for k, v in options.items() if k not in shared}
    share, change = carve.Share(**{"axis": 0, **shared}), carve.Variation(**rest)  # type: ignore[arg-type]
    return list(carve.experts(matrix, count, share, change, scale))  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_expert_e_holds_part_e_modulo_parts(parts: int, first: int) -> None:
    width = WIDTH // parts
    for number, piece in enumerate(cut(6, parts=parts, first=first)):
        part = (first + number) % parts
        assert torch.equal(piece, MATRIX[part * width : (part + 1) * width])


def test_parts_of_one_replica_hold_every_neuron_once() -> None:
    order = draw.permutation(WIDTH, 3, "order").tolist()
    pieces = cut(4, parts=4, order=order)
    assert torch.equal(torch.cat(pieces), MATRIX[order])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scale_is_multiplied_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    source = MATRIX.to(dtype)
    (piece,) = cut(1, source, scale=1 / 3)
    wide = source if dtype == torch.float64 else source.float()
    assert piece.dtype == dtype and torch.equal(piece, (wide * (1 / 3)).to(dtype))
    assert torch.equal(source, MATRIX.to(dtype)), "the source is left alone"


def test_permuted_copies_hold_the_same_neurons_in_other_orders() -> None:
    pieces = cut(3, permute="layer0", seed=5)
    assert not any(torch.equal(a, b) for a, b in zip(pieces, [MATRIX, *pieces[:2]], strict=True))
    for number, piece in enumerate(pieces):
        order = draw.permutation(WIDTH, 5, f"layer0/{number}/permute")
        assert torch.equal(piece, MATRIX[order])


def test_gate_up_and_down_are_permuted_alike() -> None:
    """One stream names all three, so that the expert computes what it did."""
    rows = cut(2, permute="layer3", seed=1, name="gate")
    columns = cut(2, MATRIX.T.contiguous(), axis=1, permute="layer3", seed=1, name="down")
    assert all(torch.equal(a, b.T) for a, b in zip(rows, columns, strict=True))


def test_noise_has_the_wanted_size_and_its_own_stream_an_expert() -> None:
    pieces = cut(2, noise=0.25, seed=2, name="w")
    std = float(MATRIX.std(correction=0))
    for number, piece in enumerate(pieces):
        drawn = draw.normal(MATRIX.numel(), 2, f"w/{number}/noise", np.float32)
        wanted = MATRIX.numpy() + drawn.reshape(WIDTH, HIDDEN) * (0.25 * std)
        np.testing.assert_allclose(piece.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(*pieces)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_redrawn_neurons_follow_the_entries_they_replace(axis: int, ratio: float) -> None:
    matrix = MATRIX if axis == 0 else MATRIX.T.contiguous()
    (piece,) = cut(1, matrix, axis=axis, redraw=ratio, same="layer1", seed=4, name="up")
    chosen = draw.permutation(WIDTH, 4, "layer1/0/redraw")[: int(WIDTH * ratio)]
    kept = np.setdiff1d(np.arange(WIDTH), chosen)
    made, old = (t.numpy() if axis == 0 else t.numpy().T for t in (piece, matrix))
    assert (made[kept] == old[kept]).all()
    if len(chosen):
        fresh = draw.normal(len(chosen) * HIDDEN, 4, "up/0/values", np.float32)
        fresh = fresh.reshape(len(chosen), HIDDEN)
        if axis == 1:
            fresh = fresh.reshape(HIDDEN, len(chosen)).T
        replaced = old[chosen].astype(np.float64)
        wanted = fresh * replaced.std() + replaced.mean()
        np.testing.assert_allclose(made[chosen], wanted, rtol=1e-4, atol=1e-5)


def test_reference_redraws_each_matrix_by_itself() -> None:
    """Drop-Upcycling's own code draws an index set a matrix; moetool's default draws one."""
    names = ("gate", "up")

    def changed(same: str | None) -> list[set[int]]:
        found = []
        for name in names:
            (piece,) = cut(1, redraw=0.5, same=same, seed=9, name=name)
            found.append({int(i) for i in (piece != MATRIX).any(1).nonzero().flatten()})
        return found

    together, apart = changed("layer0"), changed(None)
    assert together[0] == together[1] and apart[0] != apart[1]
    assert all(len(rows) == WIDTH // 2 for rows in together + apart)


def test_another_seed_is_another_expert_and_the_same_seed_the_same() -> None:
    def made(seed: int) -> torch.Tensor:
        return cut(1, redraw=0.5, same="a", seed=seed, name="w")[0]

    assert torch.equal(made(1), made(1)) and not torch.equal(made(1), made(2))


def test_all_changes_in_their_order() -> None:
    """Permuted, then drawn anew, then noise, then scale; one cast at the end."""
    (piece,) = cut(
        1,
        MATRIX.bfloat16(),
        permute="p",
        redraw=0.25,
        same="p",
        noise=0.1,
        scale=2.0,
        seed=3,
        name="n",
    )
    work = MATRIX.bfloat16().float()[draw.permutation(WIDTH, 3, "p/0/permute")]
    work = carve.redrawn(work, 0, carve.Variation(redraw=0.25, same="p", seed=3, name="n"), 0)
    work = carve.noisy(work, 0.1, seed=3, name="n/0/noise")
    assert torch.equal(piece, (work * 2.0).bfloat16())


def test_planning_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "normal", lambda *a: pytest.fail("numbers drawn on the meta device"))
    ghost = torch.empty(WIDTH, HIDDEN, device="meta", dtype=torch.bfloat16)
    pieces = cut(
        3,
        ghost,
        parts=2,
        noise=0.1,
        redraw=0.5,
        same=None,
        name="w",
    )
    assert [(p.shape, p.dtype, p.is_meta) for p in pieces] == [
        (torch.Size([WIDTH // 2, HIDDEN]), torch.bfloat16, True)
    ] * 3


@pytest.mark.parametrize("law", ["normal", "kaiming", "centred"])
def test_router_rows(law: str) -> None:
    """The three laws in their own words, and groups of equal rows."""
    made = draw.matrix((6, 8), law=law, seed=1, name="r", sigma=0.1, repeat=2).astype(np.float64)
    assert made.shape == (6, 8) and (made[0::2] == made[1::2]).all()
    if law == "normal":
        wanted = draw.normal(24, 1, "r") * 0.1
    elif law == "kaiming":
        wanted = (2 * draw.uniform(24, 1, "r") - 1) / math.sqrt(8)
    else:
        flat = draw.uniform(24, 1, "r")
        wanted = (flat - flat.mean()) * 0.1 * math.sqrt(12)
    np.testing.assert_allclose(made[0::2], wanted.reshape(3, 8), rtol=1e-6)


def test_an_unknown_router_law() -> None:
    with pytest.raises(ValueError, match="unknown router law 'best'"):
        draw.matrix((2, 2), law="best", seed=0, name="r")


def test_long_streams_begin_like_short_ones() -> None:
    """Whole blocks are drawn, so the length asked for changes nothing before it."""
    long = draw.normal(200_000, 0, "x")
    assert (draw.normal(70_000, 0, "x") == long[:70_000]).all()
    assert (draw.uniform(10, 0, "x") == draw.uniform(1000, 0, "x")[:10]).all()
    assert draw.normal(5, 0, "x", np.float32).dtype == np.float32
    np.testing.assert_allclose(draw.normal(5, 0, "x", np.float32), long[:5], rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_permutations_hold_every_number_once(count: int) -> None:
    assert sorted(draw.permutation(count, 0, "p")) == list(range(count))
