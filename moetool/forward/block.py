"""One MoE block in memory, read through the layout: router, experts and shared expert, for the
kernels of kernels/moe.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from moetool.errors import MoetoolError
from moetool.kernels import form, moe
from moetool.surgery import reform
from moetool.surgery.counted import Counted
from moetool.surgery.experts import Mixture

Tensor = torch.Tensor


@dataclass(frozen=True)
class Block:
    """A MoE block: router [experts + zero experts, hidden] and bias in float32, experts as stored
    or widened, the shared expert in float32.
    """

    router: Tensor
    bias: Tensor | None
    experts: moe.Experts
    law: moe.Law
    shared: dict[str, Tensor]
    zero_experts: int = 0

    def route(self, x: Tensor) -> moe.Routing:
        """x [tokens, hidden] -> where they go."""
        return moe.select(x, self.router, self.law, self.bias)

    def routed(
        self, x: Tensor, routing: moe.Routing, look: Callable[[moe.AtWork], None] | None = None
    ) -> Tensor:
        """The routed experts' output [tokens, hidden]."""
        return moe.mix(x, routing, self.experts, self.law, look)

    def always(self, x: Tensor) -> Tensor | None:
        """The shared expert's output, if there is one."""
        if "down" not in self.shared:
            return None
        made = moe.ffn(
            x, self.shared["gate"], self.shared["up"], self.shared["down"], self.experts.act
        )
        return (
            made * torch.sigmoid(x @ self.shared["switch"].T) if "switch" in self.shared else made
        )

    def with_experts(self, keep: list[int]) -> Block:
        """The block with only these experts, in this order; zero experts stay last."""
        e = self.experts
        order = torch.tensor(keep, device=self.router.device)
        with_identity = torch.cat(
            [order, torch.arange(e.count, e.count + self.zero_experts, device=order.device)]
        )
        law = replace(self.law, top_k=min(self.law.top_k, len(with_identity)))

        def pick(bias: Tensor | None) -> Tensor | None:
            return None if bias is None else bias[order]

        chosen = replace(
            e,
            gate_up=e.gate_up[order],
            down=e.down[order],
            gate_up_bias=pick(e.gate_up_bias),
            down_bias=pick(e.down_bias),
        )
        bias = None if self.bias is None else self.bias[with_identity]
        return replace(self, router=self.router[with_identity], bias=bias, experts=chosen, law=law)


@dataclass(frozen=True)
class OnDemand:
    """The experts of a layer that are read when tokens come to them: one in memory at a time, in
    float32.
    """

    mixture: Mixture
    layer: int
    count: int
    act: Any
    device: str = "cpu"
    _held: dict[int, moe.Experts] = field(default_factory=dict)

    def _one(self, expert: int) -> moe.Experts:
        if expert not in self._held:
            self._held.clear()
            only = range(expert, expert + 1)
            self._held[expert] = _experts(
                self.mixture, self.layer, only, self.act, self.device, True
            )
        return self._held[expert]

    def hidden(self, x: Tensor, expert: int) -> Tensor:
        """x [tokens, hidden] -> what down_proj of this expert sees [tokens, width]."""
        return self._one(expert).hidden(x, 0)

    def out(self, h: Tensor, expert: int) -> Tensor:
        """h [tokens, width] -> [tokens, hidden]."""
        return self._one(expert).out(h, 0)


def activation(mixture: Mixture) -> Callable[..., Tensor]:
    """What the experts compute between their matrices; MoetoolError for a word nobody knows."""
    said = mixture.act()
    try:
        return moe.activation(**said)
    except KeyError:
        raise MoetoolError(
            "experts with this activation cannot be run",
            file=f"{mixture.source.folder}/config.json",
            field="hidden_act",
            expected="an activation that moetool computes, silu for example",
            found=said["name"],
            hint="restore config.json from the original model; methods that need no text run no "
            "experts: `moetool methods list` marks them",
        ) from None


def read(
    mixture: Mixture,
    layer: int,
    *,
    device: str = "cpu",
    widen: bool = True,
    only: int | None = None,
    hold: bool = True,
) -> Block:
    """Read a layer's block, or its first `only` experts. With `widen` the experts are held in
    float32 (faster), else as stored (half the memory). Without `hold` each is read when it is
    run: `route`, `routed` and `always` work, in the memory of one expert.

    Raises MoetoolError for quantized experts and for families whose experts are no gated FFNs.
    """
    router = _router(mixture, layer)
    bias = mixture.side(layer, "router.bias")
    act, count = activation(mixture), mixture.count_in(layer)

    def whole(name: str) -> Tensor:
        return mixture.source.matrix(name, device).float()

    some = min(only or count, count)
    experts = (
        _experts(mixture, layer, range(some), act, device, widen)
        if hold
        else cast(moe.Experts, OnDemand(mixture, layer, some, act, device))
    )
    kept = list(range(some)) + list(range(count, count + mixture.zero_experts))
    return Block(
        router=whole(router.stored.name)[kept],
        bias=None if bias is None else whole(bias.stored.name).reshape(-1)[kept],
        experts=experts,
        law=moe.Law(**mixture.law()),
        shared={r: whole(s.name) for r, s in mixture.shared(layer).items()},
        zero_experts=mixture.zero_experts,
    )


def _router(mixture: Mixture, layer: int) -> Counted:
    """The layer's router, where there is one and its experts can be computed with."""
    if not mixture.plain:
        raise MoetoolError(
            f"the experts of {mixture.layout.model_type} here cannot be computed with",
            file=mixture.source.folder,
            expected="gate, up and down in floating point",
            found=sorted({c.role for c in mixture.counted.values() if c.kind == "expert"})[:6],
            hint="methods that need no text work: `moetool methods list` marks them",
        )
    router = mixture.side(layer, "router")
    if router is None:
        raise MoetoolError(
            "a MoE layer has no router",
            file=mixture.source.folder,
            tensor=f"layer {layer}",
            hint="the checkpoint is incomplete: download it again",
        )
    return router


def _experts(
    mixture: Mixture, layer: int, experts: range, act: Any, device: str, widen: bool
) -> moe.Experts:
    """Some experts of a layer, one read at a time into the stack."""
    lie = mixture.orientation(layer)
    stack: dict[str, Tensor] = {}
    for place, expert in enumerate(experts):
        pieces = mixture.pieces(layer, expert)
        parts = form.canonical(
            {r: mixture.source.matrix(p, device) for r, p in pieces.items()},
            transposed=lie["transposed"],
            interleaved=lie["interleaved"],
        )
        for name, tensor in parts.items():
            if name not in stack:
                stack[name] = torch.empty(
                    (len(experts), *tensor.shape),
                    dtype=torch.float32 if widen else tensor.dtype,
                    device=device,
                )
            stack[name][place].copy_(tensor)
    return moe.Experts(
        stack["gate_up"], stack["down"], act, stack.get("gate_up_bias"), stack.get("down_bias")
    )


def as_held(
    mixture: Mixture, layer: int, parts: Mapping[str, Tensor], *, kept: str
) -> dict[str, Tensor]:
    """One new expert's canonical parts with the values that an output holds when matrices
    are stored as `kept` says (reform.held).
    """
    lie = mixture.orientation(layer)
    turned, mixed = lie["transposed"], lie["interleaved"]
    own = mixture.pieces(layer, 0)
    lying = form.stored(parts, list(own), transposed=turned, interleaved=mixed)
    made = {
        role: reform.held(mixture.source.tensor(own[role].name), matrix, kept)
        for role, matrix in zip(own, lying, strict=True)
    }
    return form.canonical(made, transposed=turned, interleaved=mixed)
