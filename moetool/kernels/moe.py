"""Reference mathematics of a gated FFN and of a MoE block, in the dtype it is given; small, plain, and slow on purpose."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

Tensor = torch.Tensor


def activation(name: str) -> Any:
    """The function of a config's `hidden_act`; KeyError for one that is not known."""
    return {
        "silu": functional.silu, "swish": functional.silu, "gelu": functional.gelu, "relu": functional.relu,
        "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"), "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
        "relu2": lambda x: functional.relu(x) ** 2,
    }[name]  # fmt: skip


def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: Any) -> Tensor:
    """x [tokens, hidden] -> [tokens, hidden]; gate, up [width, hidden], down [hidden, width]."""
    hidden: Tensor = act(x @ gate.T) * (x @ up.T)
    return hidden @ down.T


def route(x: Tensor, router: Tensor, *, score: str, renorm: bool, top_k: int, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """Combine weights [tokens, experts], zero where an expert is not selected. router [experts, hidden].

    `bias` moves the selection, never the weights (DeepSeek-V3, arXiv 2412.19437). `sparsemixer` without jitter weighs both
    of its experts 1 (PhiMoE, transformers modeling_phimoe).
    """
    logits = x @ router.T
    if score == "softmax":
        scores = logits.softmax(-1)
    elif score == "sigmoid":
        scores = logits.sigmoid()
    elif score == "sparsemixer":
        scores = torch.ones_like(logits)
    else:
        raise ValueError(f"unknown routing law {score!r}")
    choice = logits if score == "sparsemixer" else scores
    chosen = (choice if bias is None else choice + bias).topk(top_k, dim=-1).indices
    picked = scores.gather(-1, chosen)
    if renorm:
        picked = picked / picked.sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, chosen, picked * scale)
