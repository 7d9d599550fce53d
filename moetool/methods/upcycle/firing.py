"""Cutting FFNs by what fires on text: one layer at a time, while the text goes through (CMoE, arXiv
2502.04416).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moetool.errors import MoetoolError
from moetool.forward import profile as profiling
from moetool.forward.batches import Batches
from moetool.forward.block import Block
from moetool.forward.catch import Look
from moetool.forward.linears import Linear
from moetool.forward.solve import Solved, Work, solve
from moetool.forward.stats import Wanted
from moetool.kernels import fires, moe
from moetool.methods.contract import Decisions, Settings
from moetool.methods.options import Text
from moetool.methods.reduce.asked import calibration
from moetool.methods.upcycle import carve
from moetool.methods.upcycle.ground import Ground

Tensor = torch.Tensor
ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # as configs say them


@dataclass(frozen=True)
class Cutting:
    """How FFNs are cut: in so many parts, of which some are shared; `marks`: neurons that count as
    firing on a token; `act`: the FFN's activation as a route says it.
    """

    split: int
    shared: int
    marks: int
    act: str


def decide(ground: Ground, cut: Cutting, text: Text, settings: Settings) -> Decisions:
    """The order of neurons in each layer, as tables; layers that an earlier run of the same command
    finished are taken up.
    """
    batches = calibration(text, settings).read(ground.source)
    told = json.dumps(["carve", asdict(cut), ground.layers])
    work = Work(
        Path(settings.work) / "walk",
        profiling.digest(ground.source, batches, Wanted(len(batches.files)), told),
        _held(ground, cut, batches),
        settings.memory,
        settings.device,
        settings.tell,
        settings.stop,
        "carve",
    )
    made = solve(ground.source, batches, work, Watching(ground, cut))
    notes = {layer: made.notes[layer] for layer in ground.layers}
    shares = [note["shared"] for note in notes.values()]
    report = {
        "tokens": batches.total,
        "shared": sum(shares) / len(shares),
        "warnings": list(batches.notes),
    }
    orders = {layer: note["order"] for layer, note in notes.items()}
    return Decisions(_tables(orders, cut), report, made.peak)


def _tables(orders: Mapping[int, list[int]], cut: Cutting) -> dict[str, list[int]]:
    """Neurons part after part, and the first of each that is not shared, by layer."""
    tables = {carve.order_name(layer): order for layer, order in orders.items()}
    for layer, order in orders.items():
        wide = len(order) // cut.split
        tables[carve.leads_name(layer)] = order[wide * cut.shared :: wide]
    return tables


def _held(ground: Ground, cut: Cutting, batches: Batches) -> int:
    """Bytes beside a layer: rows of length one, marks with what comes of them, the assignment."""
    routed = ground.width * (cut.split - cut.shared) // cut.split
    rows = 2 * 2 * 4 * ground.width * ground.hidden
    marks = batches.total * cut.marks * (2 * 8 + 8 + 8)
    most = max(batch.ids.size for batch in batches.batches)
    return rows + marks + 6 * 8 * routed * (cut.split - cut.shared) + 4 * 4 * most * ground.width


class Watching:
    """Sees what goes into each FFN (forward/solve.py)."""

    linears, changes, gates = True, False, 0
    look: Look | None = None

    def __init__(self, ground: Ground, cut: Cutting) -> None:
        self.ground, self.cut = ground, cut
        self.act = moe.activation(ACTIVATIONS.get(cut.act, cut.act))
        self.first = ""  # the linear whose inputs are looked at
        self.gate = self.up = torch.empty(0)
        self.marks: list[Tensor] = []

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        self.marks, self.first = [], ""
        if layer not in self.ground.layers:
            return
        known = {linear.key: linear for linear in linears}
        found = {
            one.role: known.get(self.ground.stored(one, layer).name)
            for one in self.ground.block.linears
        }
        into = [found[role] for role in ("gate_up", "gate", "up") if role in found]
        if None in into:
            raise MoetoolError(
                "an FFN's linears are no linears of the model's class",
                file=self.ground.source.folder,
                tensor=f"layer {layer}",
                expected=", ".join(found),
                found=", ".join(known),
                hint="use --carve kmeans:gate, which looks at weights alone",
            )
        seen = [one for one in into if one is not None]
        self.first = seen[0].key
        both = torch.cat([one.weight for one in seen])
        self.gate, self.up = (fires.unit_rows(half) for half in both.chunk(2))

    def inputs(self, linear: Linear, x: Tensor) -> None:
        if linear.key == self.first:
            found = fires.strongest(x.float(), self.gate, self.up, self.act, self.cut.marks)
            self.marks.append(found.cpu())

    def solve(self, layer: int, block: Block | None) -> Solved:
        if not self.first:
            return Solved()
        marks = torch.cat(self.marks).numpy()
        made = fires.parts(marks, self.ground.width, self.cut.split, self.cut.shared)
        self.marks = []
        return Solved({"order": made.order.tolist(), "shared": made.shared})
