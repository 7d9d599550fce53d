"""Kernels against plain references and stock modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moetool.kernels import carve, cluster, codec, combine, draw, moe


def test_streams_never_change() -> None:
    """Outputs of old plans must come again: these figures are part of the format."""
    assert draw.uniform(3, 0, "a").tolist() == [
        0.43047461672059645,
        0.7731162997415526,
        0.09050190444836476,
    ]
    assert draw.permutation(6, 7, "b").tolist() == [4, 5, 0, 3, 1, 2]
    assert draw.normal(3, 1, "c") == pytest.approx(
        [-0.623857988758358, 0.07587931946562054, -0.762516533409716], abs=1e-12
    )


def test_normal_is_normal() -> None:
    from scipy import stats

    values = draw.normal(200_000, 0, "x")
    assert (
        stats.kstest(values, "norm").pvalue > 0.01
        and abs(values.mean()) < 0.01
        and abs(values.std() - 1) < 0.01
    )


@pytest.mark.parametrize("law", ["normal", "kaiming", "centred"])
def test_router_laws(law: str) -> None:
    values = draw.matrix((64, 512), law=law, sigma=0.05, seed=0, name="r")
    expected = 1 / np.sqrt(3 * 512) if law == "kaiming" else 0.05
    assert values.std() == pytest.approx(expected, rel=0.02) and values.dtype == np.float32
    if law == "centred":
        assert abs(values.mean()) < 1e-8
    repeated = draw.matrix((64, 512), law=law, sigma=0.05, seed=0, name="r", repeat=4)
    assert (repeated[:4] == repeated[0]).all() and len({tuple(r[:4]) for r in repeated}) == 16


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_numpy_and_torch_write_the_same_bytes(dtype: str) -> None:
    values = np.concatenate(
        [draw.normal(1000, 0, "v"), [0.0, -0.0, 1e-3, 65504.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8]]
    ).astype(np.float32)
    assert bytes(codec.encode(values, dtype)) == bytes(
        codec.encode(torch.from_numpy(values), dtype)
    )
    back = codec.decode(bytearray(codec.encode(values, dtype)), dtype, (len(values),))
    assert codec.as_float64(bytes(codec.encode(values, dtype)), dtype) == pytest.approx(
        back.double().numpy(), abs=0
    )


def test_experts_against_a_loop() -> None:
    matrix = torch.randn(24, 10, dtype=torch.float64)
    order = draw.permutation(24, 0, "o").tolist()
    for axis, whole in ((0, matrix), (1, matrix.T.contiguous())):
        got = list(carve.experts(whole, 8, carve.Share(axis, 4, order), scale=4.0))
        for number, piece in enumerate(got):
            rows = [order[(number % 4) * 6 + i] for i in range(6)]
            expected = torch.stack([matrix[r] * 4 for r in rows])
            assert torch.equal(piece, expected if axis == 0 else expected.T)


def test_combine_is_a_float64_sum() -> None:
    parts = [torch.randn(50, dtype=torch.bfloat16) for _ in range(3)]
    expected = (
        0.2 * parts[0].double() + 0.3 * parts[1].double() + 0.5 * parts[2].double()
    ).bfloat16()
    assert torch.equal(combine.weighted(parts, [0.2, 0.3, 0.5]), expected)
    assert combine.weighted(parts, [0.0, 1.0, 0.0]) is parts[1]
    assert torch.equal(combine.affine(parts[0], 2.0, 1.0), (parts[0].float() * 2 + 1).bfloat16())


@pytest.mark.parametrize(("points", "clusters"), [(240, 8), (64, 2), (90, 3)])
def test_balanced_kmeans(points: int, clusters: int) -> None:
    """Equal sizes; well separated blobs are found; the assignment is near the optimum of scipy's
    exact solver.
    """
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(clusters, 12)) * 10
    truth = np.arange(points) % clusters
    labels = cluster.balanced_kmeans(centres[truth] + rng.normal(size=(points, 12)), clusters, 0)
    assert np.bincount(labels).tolist() == [points // clusters] * clusters
    assert all(len(set(labels[truth == c])) == 1 for c in range(clusters))
    cost = rng.normal(size=(points, clusters))
    mine = cluster.assign_evenly(cost)
    rows, columns = linear_sum_assignment(np.repeat(cost, points // clusters, axis=1))
    best = np.repeat(cost, points // clusters, axis=1)[rows, columns].sum()
    assert np.bincount(mine).tolist() == [points // clusters] * clusters
    assert cost[np.arange(points), mine].sum() <= best + 0.05 * abs(best)


def test_kmeans_refuses_uneven_counts() -> None:
    with pytest.raises(ValueError, match="equal clusters"):
        cluster.balanced_kmeans(np.zeros((10, 2)), 3, 0)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "dots1", "flex_olmo"]
)
def test_route_is_transformers_own(family: str) -> None:
    """Our combine weights times our experts equal the stock block on random weights."""
    import transformers

    from moetool.surgery.layout import Layout

    layout = Layout.load(family)
    fields = layout.fields
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        fields["experts"]: 6,
        fields["top_k"]: 3,
        "pad_token_id": 0,
    }
    small |= {fields["expert_width"]: 24} if "expert_width" in fields else {}
    small |= {
        k: v
        for k, v in {
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 16,
            "routed_scaling_factor": 1.7,
        }.items()
        if k in layout.defaults
    }
    torch.manual_seed(0)
    model = (
        getattr(transformers, layout.cls)
        ._from_config(transformers.CONFIG_MAPPING[family](**small))
        .eval()
    )
    block = model.model.layers[0].mlp
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
        x = torch.randn(1, 20, 32)
        expected = block(x)
        expected = (expected[0] if isinstance(expected, tuple) else expected)[0]
        state = dict(block.named_parameters())
        law = layout.overlay.law
        scale = small.get("routed_scaling_factor", 1.0)
        ours = moe.Law(3, law.score, renorm=True, scale=scale)
        weights = moe.select(x[0], state["gate.weight"], ours).dense()
        both, down = state["experts.gate_up_proj"], state["experts.down_proj"]
        act = moe.activation("silu")
        made = sum(
            weights[:, e : e + 1] * moe.ffn(x[0], *both[e].chunk(2), down[e], act) for e in range(6)
        )
        for name in ("shared_expert", "shared_experts"):
            if f"{name}.down_proj.weight" in state:
                shared = moe.ffn(
                    x[0], *(state[f"{name}.{m}_proj.weight"] for m in ("gate", "up", "down")), act
                )
                made = made + (
                    shared * torch.sigmoid(x[0] @ state["shared_expert_gate.weight"].T)
                    if name == "shared_expert"
                    else shared
                )
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_unknown_law() -> None:
    with pytest.raises(ValueError, match="unknown routing law"):
        moe.select(torch.zeros(1, 2), torch.zeros(3, 2), moe.Law(1, "magic"))
