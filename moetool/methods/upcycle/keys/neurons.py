"""How much the neuron that stands for an expert fires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.route import Router
from moetool.surgery.route import RouterTensor
from moetool.surgery.spec import Piece, rows, whole

SPREAD = "spread"
# Activations by what configs call them.
_ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_FIELDS = ("hidden_act", "hidden_activation", "activation_function")


@dataclass(frozen=True)
class Representatives:
    """The options of the key."""

    neurons: str = option(
        SPREAD,
        "the neuron of the FFN that stands for each expert: spread (evenly), or their numbers",
        metavar="spread|3,77,...",
    )


class NeuronsKey(RouteKey):
    """How much the neuron that stands for an expert fires: the router's rows are that neuron's own
    rows of the FFN, byte for byte, and nothing is drawn. CMoE (arXiv 2502.04416).
    """

    name = "neurons"
    draws = False
    Options: ClassVar[type] = Representatives
    own: Representatives

    def __init__(self, own: Any = None) -> None:
        super().__init__(own)
        self.shown: dict[int, str] = {}  # layer -> the table of those that text showed

    def check(self, ground: Ground, choices: int, top_k: int) -> None:
        self.options(ground, choices, top_k)
        self._numbers(choices, ground.width)
        if ground.block.linears[0].transposed:
            raise UsageError(
                "--key neurons needs an FFN whose neurons are rows",
                expected="weights that lie as [out, in]",
                found="[in, out]",
                hint="leave out --key",
            )

    def _numbers(self, choices: int, width: int) -> list[int]:
        said = self.own.neurons
        if said == SPREAD:
            return [one * width // choices for one in range(choices)]
        numbers = [int(n) if n.isdigit() else -1 for n in said.split(",")]
        if len(numbers) != choices or not all(0 <= n < width for n in numbers):
            raise UsageError(
                "--neurons are not one neuron an expert",
                expected=f"{choices} numbers from 0 to {width - 1}, or {SPREAD}",
                found=said,
                hint=f"leave out --neurons: {SPREAD}",
            )
        return numbers

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        said = [ground.at.config.get(name) for name in _FIELDS]
        known = [ground.at.layout.defaults.get(name) for name in _FIELDS]
        named = next((str(act) for act in (*said, *known) if act), "none")
        if named not in _ACTS:
            raise UsageError(
                "--key neurons does not know the activation of this FFN",
                expected=", ".join(_ACTS),
                found=named,
                hint="leave out --key",
            )
        act, gated = _ACTS[named], {one.role for one in ground.block.linears} - {"fc1", "fc2"}
        return ({"gated": True} if gated else {}) | ({} if act == "silu" else {"act": act})

    def one(self, build: Builder, spot: Spot, tensor: RouterTensor, start: Router) -> None:
        target, ground = self.target(build, spot, tensor), spot.ground
        lying = {linear.role: ground.stored(linear, spot.layer) for linear in spot.block.linears}
        held = lying.get("gate_up") or lying.get(tensor.name) or lying["fc1"]
        first = ground.width if "gate_up" in lying and tensor.name == "up" else 0
        if table := self.shown.get(spot.layer):
            piece: Piece = rows(held, first, first + ground.width)
            build.task("unit_rows", [piece], [whole(target)], order=table)
            return
        for expert, number in enumerate(self._numbers(spot.group.choices, ground.width)):
            piece = rows(held, first + number, first + number + 1)
            build.copy(piece, rows(target, expert, expert + 1))
