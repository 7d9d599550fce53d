"""Routing laws, experts and mixing, against plain loops over tokens in float64 that share no code with
the kernels.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from moetool.kernels import moe

TOKENS, EXPERTS, HIDDEN, WIDTH = 40, 8, 6, 5


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


X, ROUTER, BIAS = (
    numbers(TOKENS, HIDDEN),
    numbers(EXPERTS, HIDDEN, seed=1),
    numbers(EXPERTS, seed=2),
)


def by_hand(x: list[float], law: moe.Law, bias: list[float] | None) -> dict[int, float]:
    """Expert -> weight for one token, as transformers' modules say it in words."""
    logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in ROUTER.tolist()]
    if bias is not None and law.bias == "logit":
        logits = [v + b for v, b in zip(logits, bias, strict=True)]
    if law.score == "softmax":
        top = max(logits)
        total = sum(math.exp(v - top) for v in logits)
        scores = [math.exp(v - top) / total for v in logits]
    elif law.score == "sparsemixer":
        scores = [1.0] * EXPERTS
    else:
        scores = [1 / (1 + math.exp(-v)) for v in logits]
    choice = logits if law.score in ("sparsemixer", "sigmoid-on-input") else list(scores)
    if bias is not None and law.bias == "choice":
        choice = [v + b for v, b in zip(choice, bias, strict=True)]
    if law.groups > 1:
        choice = in_groups(choice, law)
    chosen = sorted(range(EXPERTS), key=lambda e: -choice[e])[: law.top_k]
    source = choice if law.groups > 1 and law.group_rule == "max" else scores
    weights = {e: source[e] for e in chosen}
    if law.score == "sparsemixer":
        weights = {e: among_near(logits, chosen[:n], e, law.near) for n, e in enumerate(chosen)}
    if law.renorm:
        total = max(sum(weights.values()), law.least_sum)
        weights = {e: w / total for e, w in weights.items()}
    return {e: w * law.scale for e, w in weights.items()}


def among_near(logits: list[float], gone: list[int], best: int, near: float) -> float:
    """An expert's share among those that are left and not far below it."""
    top = logits[best]
    there = [
        v for e, v in enumerate(logits) if e not in gone and (top - v) / max(abs(v), top) <= near
    ]
    return math.exp(top) / sum(map(math.exp, there))


def in_groups(choice: list[float], law: moe.Law) -> list[float]:
    """What is not in one of the best groups becomes `group_fill`."""
    size = EXPERTS // law.groups
    groups = [choice[g * size : (g + 1) * size] for g in range(law.groups)]
    worth = [max(g) if law.group_rule == "max" else sum(sorted(g)[-2:]) for g in groups]
    best = sorted(range(law.groups), key=lambda g: -worth[g])[: law.group_top]
    return [v if e // size in best else law.group_fill for e, v in enumerate(choice)]


LAWS = [
    moe.Law(top_k, score, renorm, scale, bias)
    for top_k, score, renorm, scale, bias in itertools.product(
        (1, 3), ("softmax", "sigmoid"), (True, False), (1.0, 2.5), ("choice", "logit")
    )
]
LAWS += [
    moe.Law(2, "sparsemixer", renorm=False),
    moe.Law(2, "sparsemixer", renorm=False, near=0.4),
    moe.Law(1, "sigmoid-on-input", renorm=False),
    moe.Law(2, "sigmoid", least_sum=1.9),
    *(
        moe.Law(3, score, renorm, groups=4, group_top=2, group_rule=rule, group_fill=fill)
        for score in ("softmax", "sigmoid")
        for renorm in (True, False)
        for rule, fill in (("max", 0.0), ("sum2", float("-inf")))
    ),
]


# DeepSeek-V2, whose groups are ranked by their best expert, has no bias.
CASES = [
    (law, biased)
    for law in LAWS
    for biased in ((False,) if law.group_rule == "max" else (False, True))
]


@pytest.mark.parametrize(("law", "with_bias"), CASES, ids=repr)
def test_select_is_what_the_words_say(law: moe.Law, with_bias: bool) -> None:
    bias = BIAS if with_bias else None
    made = moe.select(X, ROUTER, law, bias)
    assert made.index.shape == made.weight.shape == (TOKENS, law.top_k)
    dense = made.dense()
    for token in range(TOKENS):
        wanted = by_hand(X[token].tolist(), law, BIAS.tolist() if with_bias else None)
        assert set(made.index[token].tolist()) == set(wanted)
        for expert, weight in wanted.items():
            assert dense[token, expert].item() == pytest.approx(weight, rel=1e-9)
        assert (dense[token] != 0).sum() <= law.top_k


def test_dense_weights_sum_to_the_scale() -> None:
    law = moe.Law(2, "sigmoid", renorm=True, scale=1.5)
    made = moe.select(X, ROUTER, law, BIAS).dense()
    torch.testing.assert_close(made.sum(1), torch.full((TOKENS,), 1.5, dtype=torch.float64))


def test_a_router_of_another_dtype_is_widened() -> None:
    narrow = ROUTER.bfloat16()
    wide = moe.select(X, narrow.double(), moe.Law(2))
    assert torch.equal(moe.select(X, narrow, moe.Law(2)).index, wide.index)


ACTIVATIONS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "swish": lambda v: v / (1 + math.exp(-v)),
    "relu": lambda v: max(v, 0.0),
    "relu2": lambda v: max(v, 0.0) ** 2,
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda v: tanh_gelu(v),
    "gelu_new": lambda v: tanh_gelu(v),
}


def tanh_gelu(v: float) -> float:
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    values = torch.linspace(-6, 6, 41, dtype=torch.float64)
    wanted = [ACTIVATIONS[name](v) for v in values.tolist()]
    assert moe.activation(name)(values).tolist() == pytest.approx(wanted, abs=1e-12)


def test_clamped_swiglu_clamps_gate_above_and_up_on_both_sides() -> None:
    act = moe.activation("clamped-swiglu", alpha=1.5, limit=2.0)
    gate, up = (
        torch.tensor([-9.0, 0.5, 9.0], dtype=torch.float64),
        torch.tensor([-9.0, 0.5, 9.0], dtype=torch.float64),
    )
    made = moe.glu(act, gate, up).tolist()
    for got, g, u in zip(made, (-9.0, 0.5, 2.0), (-2.0, 0.5, 2.0), strict=True):
        assert got == pytest.approx((u + 1) * g / (1 + math.exp(-1.5 * g)))


def test_an_unknown_activation_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="selu"):
        moe.activation("selu")


def bank(*, gated: bool = True, biased: bool = False) -> moe.Experts:
    rows = 2 * WIDTH if gated else WIDTH
    return moe.Experts(
        numbers(EXPERTS, rows, HIDDEN, seed=3),
        numbers(EXPERTS, HIDDEN, WIDTH, seed=4),
        torch.nn.functional.silu,
        numbers(EXPERTS, rows, seed=5) if biased else None,
        numbers(EXPERTS, HIDDEN, seed=6) if biased else None,
        gated=gated,
    )


def neuron_by_neuron(experts: moe.Experts, x: np.ndarray, expert: int) -> np.ndarray:
    """An expert's output for one token, as a sum over its neurons."""
    inside, down = experts.gate_up[expert].numpy(), experts.down[expert].numpy()
    bias = np.zeros(len(inside))
    if experts.gate_up_bias is not None:
        bias = experts.gate_up_bias[expert].numpy()
    total = np.zeros(HIDDEN)
    if experts.down_bias is not None:
        total += experts.down_bias[expert].numpy()
    for neuron in range(WIDTH):
        value = inside[neuron] @ x + bias[neuron]
        value = value / (1 + math.exp(-value))
        if experts.gated:
            value *= inside[WIDTH + neuron] @ x + bias[WIDTH + neuron]
        total += down[:, neuron] * value
    return total


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_an_expert_is_a_sum_over_neurons(gated: bool, biased: bool) -> None:
    experts = bank(gated=gated, biased=biased)
    everything = moe.every(X, experts)
    assert everything.shape == (EXPERTS, TOKENS, HIDDEN) and experts.count == EXPERTS
    for expert, token in itertools.product((0, 5), (0, 17)):
        wanted = neuron_by_neuron(experts, X[token].numpy(), expert)
        np.testing.assert_allclose(everything[expert, token].numpy(), wanted, rtol=1e-10)


def test_ffn_is_the_same_sum() -> None:
    experts = bank()
    gate, up = experts.gate_up[2].chunk(2)
    made = moe.ffn(X, gate, up, experts.down[2], experts.act)
    torch.testing.assert_close(made, experts.out(experts.hidden(X, 2), 2))


@pytest.mark.parametrize("score", ["softmax", "sigmoid-on-input"])
def test_mix_weighs_outputs_or_inputs(score: str) -> None:
    """Llama 4 multiplies an expert's input by the weight, everybody else its output."""
    experts, law = bank(), moe.Law(2, score, renorm=False)
    routing = moe.select(X, ROUTER, law)
    made = moe.mix(X, routing, experts, law)
    for token in range(0, TOKENS, 7):
        total = np.zeros(HIDDEN)
        for expert, weight in zip(
            routing.index[token].tolist(), routing.weight[token].tolist(), strict=True
        ):
            x = X[token].numpy()
            if score == "softmax":
                total += weight * neuron_by_neuron(experts, x, expert)
            else:
                total += neuron_by_neuron(experts, weight * x, expert)
        np.testing.assert_allclose(made[token].numpy(), total, rtol=1e-9)


def test_zero_experts_give_their_input_back() -> None:
    """LongCat-Flash: router rows beyond the experts stand for the identity."""
    experts, law = bank(), moe.Law(3)
    few = moe.Experts(experts.gate_up[:5], experts.down[:5], experts.act)
    routing = moe.select(X, ROUTER, law)
    assert (routing.index >= 5).any() and (routing.index < 5).any()
    made, dense = moe.mix(X, routing, few, law), routing.dense()
    wanted = dense[:, 5:].sum(1, keepdim=True) * X
    wanted = wanted + sum(
        dense[:, e : e + 1] * few.out(few.hidden(X, e), e) for e in range(few.count)
    )
    torch.testing.assert_close(made, wanted)


def test_visit_shows_each_token_once_an_expert() -> None:
    experts, law = bank(), moe.Law(2)
    routing = moe.select(X, ROUTER, law)
    seen = list(moe.visit(X, routing, experts, law))
    numbers_seen = [s.expert for s in seen]
    assert numbers_seen == sorted(set(routing.index.flatten().tolist()))
    for one in seen:
        rows = (routing.index == one.expert).any(1).nonzero().flatten()
        assert one.rows.tolist() == rows.tolist()
        torch.testing.assert_close(one.weight, routing.dense()[rows, one.expert])
        torch.testing.assert_close(one.h, experts.hidden(X[rows], one.expert))
        torch.testing.assert_close(one.out, experts.out(one.h, one.expert))
