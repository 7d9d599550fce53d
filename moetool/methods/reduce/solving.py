"""Deciding inside the walk: each layer is decided, rebuilt and solved on what the changed layers
below give it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moetool import atomic
from moetool.forward import profile as profiling
from moetool.forward.batches import Batches
from moetool.forward.block import Block
from moetool.forward.stats import LayerStats, Profile, Profiler, Wanted
from moetool.forward.walk import Budget, Walk
from moetool.kernels import codec, form, solve
from moetool.methods.reduce import beside
from moetool.methods.reduce.decide import Asked, Bounds, Seen, Settled, tokens_per_expert
from moetool.methods.reduce.decided import Decided
from moetool.methods.reduce.decision import Decision, Where
from moetool.methods.reduce.facts import Found, Refitted, TextSeen
from moetool.methods.reduce.view import View

if TYPE_CHECKING:
    from moetool.surgery.checkpoint import Checkpoint


@dataclass(frozen=True)
class Done:
    """What is known of a layer that was decided in the walk, as it lies in the work folder."""

    decision: Decision
    tokens: list[int]
    refit: Refitted | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "layer": self.decision.as_json(),
            "refit": asdict(self.refit) if self.refit else None,
            "tokens": self.tokens,
        }

    @classmethod
    def read(cls, path: Path, experts: int) -> Done:
        found = json.loads(path.read_text())
        refit = Refitted(**found["refit"]) if found["refit"] else None
        decision = Decision.from_json(found["layer"], experts, Where(str(path), path.stem))
        return cls(decision, found["tokens"], refit)


class LayerByLayer:
    """Decides a layer when the walk has shown it, and gives the walk the changed one."""

    def __init__(
        self, asked: Asked, within: Bounds, replay: Decided | None, wanted: Wanted, folder: Path
    ) -> None:
        self.asked, self.within, self.folder = asked, within, folder
        self.replay = dict(replay.layers) if replay else {}
        self.profiler = Profiler(wanted)
        self.done = {
            int(p.stem.partition("-")[2]): Done.read(p, asked.mixture.experts)
            for p in sorted(folder.glob("decision-*.json"))
        }

    def change(self, number: int, block: Block) -> Block:
        """The layer's new block."""
        stats = self.profiler.layers.pop(number)
        view = self.asked.view(number, stats, self.within.of(number))
        view.read_block = lambda: block
        decision = self.replay.get(number)
        if decision is None:
            decision = self.asked.way.choose(view, self.within.counts[number])
        new = self.asked.way.block(view, decision, block)
        refit = None
        if self.asked.options.refit:
            new, refit = refitted(self.asked, view, block, new, self.folder)
        done = Done(decision, tokens_per_expert(stats), refit)
        self.done[number] = done
        atomic.write(self.folder / f"decision-{number:05d}.json", json.dumps(done.as_json()))
        return new


def layer_by_layer(asked: Asked, seen: Seen, within: Bounds, replay: Decided | None) -> Settled:
    """Every layer, after those below it were changed. Layers that an earlier run finished are
    taken from the work folder.
    """
    batches = asked.calibration().read(asked.mixture.source)
    wanted, folder = _wanted(asked, batches), asked.work / "walk"
    profiling.claim(folder, _seal(asked, batches, wanted, (within, replay)))
    changing = LayerByLayer(asked, within, replay, wanted, folder)
    finished = folder / "done.json"
    if not finished.exists():  # else killed while the output was written: nothing is solved anew
        peak = _walk(asked, batches, changing)
        atomic.write(finished, json.dumps({"peak": peak}))
    done = dict(sorted(changing.done.items()))
    found = Found(
        (*within.warnings, *batches.notes),
        _text(batches),
        within.protected,
        {n: d.tokens for n, d in done.items()},
        {n: d.refit for n, d in done.items() if d.refit},
    )
    return Settled(
        {n: d.decision for n, d in done.items()},
        found,
        _solved(asked, folder),
        int(json.loads(finished.read_text())["peak"]),
    )


def _wanted(asked: Asked, batches: Batches) -> Wanted:
    o, needs = asked.options, asked.way.needs
    most = max(o.sample if needs.sample else 0, o.refit_tokens if o.refit else 0)
    sample = min(batches.total, most)
    return Wanted(len(batches.files), sample, needs.dense, needs.covariance)


def _seal(
    asked: Asked, batches: Batches, wanted: Wanted, given: tuple[Bounds, Decided | None]
) -> str:
    """Names everything that decides what the walk decides."""
    within, replay = given
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


def _walk(asked: Asked, batches: Batches, changing: LayerByLayer) -> int:
    """Send the text through; returns the promised peak."""
    settings = asked.settings
    walking = Walk(
        asked.mixture.source,
        batches,
        Budget(settings.memory, changing.folder, settings.device),
        extra=_held(asked, changing.profiler.wanted),
        tell=settings.tell,
        stop=settings.stop,
        name="propagate",
    )
    walking.run(changing.profiler, changing.change)
    walking.hidden.clear()
    return walking.peak


def _held(asked: Asked, wanted: Wanted) -> int:
    """Bytes held beside a layer: statistics, the changed block beside the old one, and the normal
    equations of --refit.
    """
    mixture = asked.mixture
    hidden = int(mixture.layout.field("hidden", mixture.text_model.config))
    width = profiling.width_of(mixture)
    changed = 4 * mixture.experts * mixture.expert_elements(mixture.layers[0])
    held = wanted.memory(mixture.experts, hidden, width) + changed + asked.way.needs.buffers
    if asked.options.refit:
        grams = 16 * mixture.experts * width * width // max(1, mixture.experts // 4)
        held += 6 * 4 * wanted.sample * hidden + grams
    return held


def _text(batches: Batches) -> TextSeen:
    files = [{"name": n, "tokens": t} for n, t in zip(batches.files, batches.tokens, strict=True)]
    return TextSeen(batches.total, files, batches.digest, batches.seq_len)


def _solved(asked: Asked, folder: Path) -> tuple[Checkpoint, ...]:
    return (beside.solved_source(folder),) if asked.options.refit else ()


def refit_from(asked: Asked, profile: Profile, settled: Settled) -> Settled:
    """Refit on the sample that a profile kept (the layers below unchanged)."""
    folder, made = asked.work / "solved", {}
    for number in asked.mixture.layers:
        decision = settled.layers[number]
        view = asked.view(number, profile.layer(number))
        new = asked.way.block(view, decision, view.block)
        _, made[number] = refitted(asked, view, view.block, new, folder)
    found = replace(settled.found, refit=made)
    return replace(settled, found=found, extra=_solved(asked, folder))


def refitted(
    asked: Asked, view: View, block: Block, new: Block, folder: Path
) -> tuple[Block, Refitted]:
    """The new block with its down matrices solved on the view's sample, so that it puts out what
    `block` did. They are written to `folder` as the output will hold them, and the block continues
    with exactly those (rounded) values.
    """
    x = _sample(view.seen).to(block.router.device)
    target = block.routed(x, block.route(x))
    made = solve.refit(x, new.route(x), new.experts, new.law, target)
    stored = _as_stored(asked, view.layer, made.down)
    tensors = {beside.solved_name(view.layer, j, "down"): t for j, t in enumerate(stored)}
    beside.save_solved(folder, view.layer, tensors)
    turned = asked.mixture.orientation(view.layer)["transposed"]
    dtype = new.experts.down.dtype
    rounded = torch.stack([(t.T if turned else t).to(dtype) for t in stored])
    error = Refitted(float(f"{made.before:.4g}"), float(f"{made.after:.4g}"))
    return replace(new, experts=replace(new.experts, down=rounded)), error


def _sample(stats: LayerStats) -> torch.Tensor:
    return torch.from_numpy(stats.x).float()


def _as_stored(asked: Asked, layer: int, down: torch.Tensor) -> list[torch.Tensor]:
    """Solved matrices as the file will hold them: dtype and orientation of the original."""
    mixture = asked.mixture
    dtype = mixture.source.tensor(mixture.pieces(layer, 0)["down"].name).dtype
    turned = mixture.orientation(layer)["transposed"]
    made = []
    for matrix in down:
        (stored,) = form.stored({"down": matrix}, ["down"], transposed=turned)
        made.append(stored.to(codec.torch_dtype(dtype)).contiguous().cpu())
    return made
