"""Deciding inside the walk: each layer is decided, rebuilt and solved on what the changed layers
below give it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moetool.data import JsonObject
from moetool.forward import profile as profiling
from moetool.forward.batches import Batches
from moetool.forward.block import Block
from moetool.forward.catch import Look
from moetool.forward.linears import Linear
from moetool.forward.profiler import Profiler
from moetool.forward.solve import Solved, Work, kept
from moetool.forward.solve import solve as solve_layers
from moetool.forward.stats import LayerStats, Wanted, moments_as_kept
from moetool.methods.reduce import beside
from moetool.methods.reduce.asked import Asked, Bounds, Evidence, Settled, tokens_per_expert
from moetool.methods.reduce.decided import Decided, order_key
from moetool.methods.reduce.decision import Decision, Where
from moetool.methods.reduce.facts import Found, Refitted, TextSeen
from moetool.methods.reduce.refitting import refitted, seen_by, solving_bytes

if TYPE_CHECKING:
    from moetool.surgery.checkpoint import Checkpoint


@dataclass(frozen=True)
class Done:
    """What is known of a layer that was decided in the walk."""

    decision: Decision
    tokens: list[int]
    refit: Refitted | None = None

    def as_json(self) -> JsonObject:
        return {
            "layer": self.decision.as_json(),
            "refit": asdict(self.refit) if self.refit else None,
            "tokens": self.tokens,
        }

    @classmethod
    def from_json(cls, data: Any, layer: int, experts: int) -> Done:
        refit = Refitted(**data["refit"]) if data["refit"] else None
        at = Where("the work folder", str(layer))
        return cls(Decision.from_json(data["layer"], experts, at), data["tokens"], refit)


class LayerByLayer:
    """Decides a layer when the walk has shown it, and gives the walk the changed one
    (forward/solve.py).
    """

    linears, changes, gates = False, True, 0

    def __init__(
        self, asked: Asked, within: Bounds, replay: Decided | None, wanted: Wanted
    ) -> None:
        self.asked, self.within = asked, within
        self.replay = dict(replay.layers) if replay else {}
        self.profiler = Profiler(wanted)
        self.look: Look | None = self.profiler

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        """Not asked for."""

    def inputs(self, linear: Linear, x: torch.Tensor) -> None:
        """Not asked for."""

    def solve(self, layer: int, block: Block | None) -> Solved:
        """The layer's decision and its new block."""
        assert block is not None
        stats = moments_as_kept(self.profiler.layers.pop(layer))
        view = self.asked.view(layer, stats, self.within.of(layer))
        view.read_block = lambda: block
        decision = self.replay.get(layer)
        if decision is None:
            decision = self.asked.way.choose(view, self.within.counts[layer])
        new = self.asked.way.block(view, decision, block)
        tokens = tokens_per_expert(stats)
        aside = _as_tensors(layer, decision) | _statistics(self.asked, stats)
        if not self.asked.refits:
            return Solved(Done(decision, tokens).as_json(), aside, block=new)
        x = torch.from_numpy(stats.x).float().to(block.router.device)
        made = refitted(self.asked, layer, new, seen_by(block, x))
        note = Done(decision, tokens, made.error).as_json()
        return Solved(note, aside | made.tensors, block=made.block)


def layer_by_layer(asked: Asked, seen: Evidence, within: Bounds, replay: Decided | None) -> Settled:
    """Every layer, after those below it were changed. Layers that an earlier run finished are
    taken from the work folder.
    """
    batches = asked.calibration().read(asked.mixture.source)
    wanted, settings, folder = _wanted(asked, batches), asked.settings, asked.work / "walk"
    work = Work(
        folder,
        _seal(asked, batches, wanted, within, replay),
        _held(asked, wanted),
        settings.memory,
        settings.device,
        settings.tell,
        settings.stop,
    )
    solver = LayerByLayer(asked, within, replay, wanted)
    made = solve_layers(asked.mixture.source, batches, work, solver)
    experts = asked.mixture.experts
    done = {n: Done.from_json(note, n, experts) for n, note in made.notes.items()}
    orders: dict[str, list[int]] = {}
    for n in done:
        orders |= {k: t.tolist() for k, t in kept(folder, n).items() if not t.is_floating_point()}
    found = Found(
        (*within.warnings, *batches.notes),
        _text(batches),
        within.protected,
        within.peaks,
        {n: d.tokens for n, d in done.items()},
        {n: d.refit for n, d in done.items() if d.refit},
        wanted.sample if asked.refits else 0,
    )
    layers = {n: d.decision for n, d in done.items()}
    decided = Decided(asked.verb, asked.way.called, experts, layers).with_orders(orders)
    return Settled(
        dict(decided.layers), found, _solved(asked, folder), max(batches.peak, made.peak)
    )


def _wanted(asked: Asked, batches: Batches) -> Wanted:
    o, needs = asked.options, asked.way.needs
    most = max(o.sample if needs.sample else 0, o.refit_tokens if asked.refits else 0)
    sample = min(batches.total, most)
    return Wanted(len(batches.files), sample, needs.dense, needs.covariance)


def _seal(
    asked: Asked, batches: Batches, wanted: Wanted, within: Bounds, replay: Decided | None
) -> str:
    """Names everything that decides what the walk decides."""
    told = [
        asked.verb,
        asked.way.called,
        asdict(asked.options),
        asdict(asked.way.own),
        replay.as_json() if replay else None,
        {str(n): e for n, e in (within.protected or {}).items()},
    ]
    source = asked.mixture.source
    return profiling.digest(source, batches, wanted, json.dumps(told, sort_keys=True))


def _held(asked: Asked, wanted: Wanted) -> int:
    """Bytes held beside a layer: statistics, the changed block beside the old one, and the normal
    equations of --refit.
    """
    mixture = asked.mixture
    hidden = int(mixture.layout.field("hidden", mixture.text_model.config))
    width = mixture.width(mixture.layers[0])
    changed = 4 * mixture.experts * mixture.expert_elements(mixture.layers[0])
    held = wanted.memory(mixture.experts, hidden, width) + changed + asked.way.buffers(mixture)
    if asked.refits:
        held += solving_bytes(asked, wanted.sample)
    return held


def _text(batches: Batches) -> TextSeen:
    return TextSeen(batches.total, batches.described, batches.digest, batches.seq_len)


def _solved(asked: Asked, folder: Path) -> tuple[Checkpoint, ...]:
    """What the walk left for the plan."""
    left = asked.refits or asked.way.needs.covariance
    return (beside.solved_source(folder),) if left else ()


def _as_tensors(layer: int, decision: Decision) -> dict[str, torch.Tensor]:
    """Neuron orders, to be kept with what was solved."""
    return {
        order_key(layer, e): torch.tensor(order, dtype=torch.int32)
        for e, order in decision.orders.items()
    }


def _statistics(asked: Asked, stats: LayerStats) -> dict[str, torch.Tensor]:
    """Statistics that the plan reads, under their names in a profile."""
    kept = asked.way.kept(stats)
    return {f"{stats.layer}.{name}": torch.from_numpy(value) for name, value in kept.items()}
