"""Mathematics of a gated FFN and of a MoE block, in the dtype it is given: every routing law of
the layouts, experts on their own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

Tensor = torch.Tensor


@dataclass(frozen=True)
class Law:
    """How a router's logits become experts and weights; plain numbers, read from a layout and a
    config (surgery/experts.py).

    score: softmax | sigmoid | sparsemixer | sigmoid-on-input (Llama 4: the weight multiplies the
    expert's input). bias: choice (moves the selection only, DeepSeek-V3) | logit (part of the
    logits, gpt-oss). groups > 1: only the best `group_top` groups are eligible, by their best
    expert (group_rule max) or best two (sum2); ineligible scores become `group_fill`. near: of a
    sparsemixer, how far below the best (relative) an expert still shares in its weight.
    """

    top_k: int
    score: str = "softmax"
    renorm: bool = True
    scale: float = 1.0
    bias: str = "choice"
    groups: int = 1
    group_top: int = 1
    group_rule: str = "sum2"
    group_fill: float = float("-inf")
    least_sum: float = 0.0
    near: float = 0.0


@dataclass(frozen=True)
class Routing:
    """Where tokens go: index and weight [tokens, top_k]; logits and scores [tokens, experts] for
    those who look.
    """

    index: Tensor
    weight: Tensor
    logits: Tensor
    scores: Tensor

    def dense(self) -> Tensor:
        """Weights as [tokens, experts], zero where an expert is not selected."""
        return torch.zeros_like(self.scores).scatter(-1, self.index, self.weight)


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, stacked: gate_up [experts, 2*width, hidden] (gate above up; only up
    [experts, width, hidden] when `gated` is False), down [experts, hidden, width], biases
    [experts, ...] or None. Any float dtype: one expert at a time is widened.
    """

    gate_up: Tensor
    down: Tensor
    act: Callable[..., Tensor]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gated: bool = True

    @property
    def count(self) -> int:
        return self.down.shape[0]

    def hidden(self, x: Tensor, expert: int) -> Tensor:
        """x [tokens, hidden] -> what down_proj of this expert sees [tokens, width]."""
        mixed = functional.linear(
            x,
            self.gate_up[expert].to(x.dtype),
            None if self.gate_up_bias is None else self.gate_up_bias[expert].to(x.dtype),
        )
        if not self.gated:
            return self.act(mixed)
        gate, up = mixed.chunk(2, -1)
        return glu(self.act, gate, up)

    def out(self, h: Tensor, expert: int) -> Tensor:
        """h [tokens, width] -> [tokens, hidden]."""
        return functional.linear(
            h,
            self.down[expert].to(h.dtype),
            None if self.down_bias is None else self.down_bias[expert].to(h.dtype),
        )


class Runs(Protocol):
    """Experts that can be run one at a time, wherever their matrices are."""

    @property
    def count(self) -> int: ...

    def hidden(self, x: Tensor, expert: int) -> Tensor: ...

    def out(self, h: Tensor, expert: int) -> Tensor: ...


def activation(name: str, *, alpha: float = 1.702, limit: float = 7.0) -> Callable[..., Tensor]:
    """The function of a config's `hidden_act`; KeyError for one that is not known.
    `clamped-swiglu` (gpt-oss) takes gate and up together.
    """
    known: dict[str, Callable[..., Tensor]] = {
        "silu": functional.silu,
        "swish": functional.silu,
        "gelu": functional.gelu,
        "relu": functional.relu,
        "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
        "relu2": lambda x: functional.relu(x) ** 2,
        "clamped-swiglu": ClampedSwiglu(alpha, limit),
    }
    return known[name]


@dataclass(frozen=True)
class ClampedSwiglu:
    """gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), gate at most `limit`, up within +-limit
    (transformers modeling_gpt_oss).
    """

    alpha: float
    limit: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


def glu(act: Callable[..., Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, or the two-argument form."""
    if isinstance(act, ClampedSwiglu):
        return act(gate, up)
    made: Tensor = act(gate) * up
    return made


def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: Callable[..., Tensor]) -> Tensor:
    """x [tokens, hidden] -> [tokens, hidden]; gate, up [width, hidden], down [hidden, width]."""
    hidden: Tensor = glu(act, x @ gate.T, x @ up.T)
    return hidden @ down.T


def select(
    x: Tensor, router: Tensor, law: Law, bias: Tensor | None = None, allowed: Tensor | None = None
) -> Routing:
    """Which experts see which tokens, and how much they count. x [tokens, hidden], router
    [experts, hidden], bias [experts]; `allowed` [experts] bool routes as if the other experts were
    not there.

    Selection and weights follow transformers 5.23's modules; the families' laws are listed in
    archs/overlay.json. `sparsemixer` weighs each of its experts 1, but for experts so near that
    they share in it (PhiMoE).
    """
    logits = x @ router.to(x.dtype).T
    if bias is not None:
        bias = bias.reshape(-1).to(x.dtype)
        logits = logits + bias if law.bias == "logit" else logits
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    scores = _scores(logits, law)
    choice = logits if law.score in ("sparsemixer", "sigmoid-on-input") else scores
    if bias is not None and law.bias == "choice":
        choice = choice + bias
    if allowed is not None:
        choice = choice.masked_fill(~allowed, float("-inf"))
    if law.groups > 1:
        choice = _within_groups(choice, law)
    index = choice.topk(law.top_k, dim=-1).indices
    weight = scores.gather(-1, index)
    if law.score == "sparsemixer":
        weight = _among_near(logits, index, law.near)
    if law.groups > 1 and law.group_rule == "max":
        weight = choice.gather(-1, index)  # DeepSeek-V2 masks the scores themselves
    if law.renorm:
        total = weight.sum(-1, keepdim=True)
        weight = weight / (total.clamp_min(law.least_sum) if law.least_sum else total + 1e-20)
    return Routing(index, weight * law.scale, logits, scores)


def _scores(logits: Tensor, law: Law) -> Tensor:
    if law.score == "softmax":
        return logits.softmax(-1)
    if law.score in ("sigmoid", "sigmoid-on-input"):
        return logits.sigmoid()
    if law.score == "sparsemixer":
        return torch.ones_like(logits)
    raise ValueError(f"unknown routing law {law.score!r}")


def _among_near(logits: Tensor, index: Tensor, near: float) -> Tensor:
    """Each chosen expert's share among those that are left and hardly below it [tokens, k]
    (SparseMixer, arXiv 2409.12136, as PhiMoE evaluates it).
    """
    left, weights = logits, []
    for place in range(index.shape[-1]):
        chosen = index[..., place : place + 1]
        best = left.gather(-1, chosen)
        far = (best - logits) / logits.abs().clamp(min=best) > near
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, chosen))
        left = left.scatter(-1, chosen, float("-inf"))
    return torch.cat(weights, dim=-1)


def _within_groups(choice: Tensor, law: Law) -> Tensor:
    """Scores outside the best groups replaced by `group_fill`."""
    tokens, experts = choice.shape
    grouped = choice.view(tokens, law.groups, experts // law.groups)
    best = (
        grouped.amax(-1)
        if law.group_rule == "max"
        else grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
    )
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(
        -1, best.topk(law.group_top, -1).indices, True
    )
    return choice.masked_fill(~kept.repeat_interleave(experts // law.groups, -1), law.group_fill)


@dataclass(frozen=True)
class AtWork:
    """One expert at work on its own tokens: rows [n] of the batch, weight [n], h [n, width] (what
    down_proj sees), out [n, hidden] (unweighted output; for `sigmoid-on-input` the output for the
    already weighted input).
    """

    expert: int
    rows: Tensor
    weight: Tensor
    h: Tensor
    out: Tensor


def visit(x: Tensor, routing: Routing, experts: Runs, law: Law) -> Iterator[AtWork]:
    """Each expert with the tokens routed to it, in expert order; experts without tokens are left
    out. Identity experts (indices from `experts.count` on, LongCat) come as h = out = x.
    """
    flat = routing.index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts.count).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        places = order[start : start + count]
        start += count
        rows = torch.div(places, routing.index.shape[1], rounding_mode="floor")
        weight = routing.weight.reshape(-1)[places]
        mine = x[rows]
        if expert >= experts.count:
            yield AtWork(expert, rows, weight, mine, mine)
            continue
        h = experts.hidden(
            mine * weight[:, None] if law.score == "sigmoid-on-input" else mine, expert
        )
        yield AtWork(expert, rows, weight, h, experts.out(h, expert))


def mix(
    x: Tensor,
    routing: Routing,
    experts: Runs,
    law: Law,
    look: Callable[[AtWork], None] | None = None,
) -> Tensor:
    """The routed output [tokens, hidden]: every expert on its own tokens, weighted and summed.
    `look` sees each expert at work.
    """
    made = torch.zeros_like(x)
    for seen in visit(x, routing, experts, law):
        made.index_add_(
            0,
            seen.rows,
            seen.out if law.score == "sigmoid-on-input" else seen.out * seen.weight[:, None],
        )
        if look is not None:
            look(seen)
    return made


def every(x: Tensor, experts: Experts) -> Tensor:
    """All experts on all tokens: [experts, tokens, hidden]. For samples only: it costs experts /
    top_k times `mix`.
    """
    return torch.stack([experts.out(experts.hidden(x, e), e) for e in range(experts.count)])
