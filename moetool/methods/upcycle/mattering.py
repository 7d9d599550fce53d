"""Cutting FFNs by which neurons matter to which tokens, with a router of the tokens' clusters: a
walk up clusters what goes into each FFN, a walk down weighs its neurons by the gradient (LLaMA-MoE
v2, arXiv 2411.15708).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from moetool import atomic
from moetool.errors import MoetoolError
from moetool.forward import profile as profiling
from moetool.forward import solve
from moetool.forward.backward import Back, Ends, FfnPass, Kept, held
from moetool.forward.batches import Batches
from moetool.forward.block import Block
from moetool.forward.linears import Linear
from moetool.forward.stats import Wanted
from moetool.forward.walk import Budget
from moetool.kernels import cluster, codec, importance
from moetool.methods.contract import Decisions, Settings
from moetool.methods.options import Text
from moetool.methods.reduce.asked import calibration
from moetool.methods.reduce.beside import solved_source
from moetool.methods.upcycle import carve
from moetool.methods.upcycle.ground import Ground

Tensor = torch.Tensor
CLUSTERED = 16_384  # tokens of a layer that are clustered, evenly spaced
SLACK = 0.4  # how far a cluster's size may be from the mean (hidden_clustering.sh)


@dataclass(frozen=True)
class Parting:
    """How FFNs are cut: in so many parts, of which some are shared."""

    split: int
    shared: int
    seed: int


def decide(ground: Ground, cut: Parting, text: Text, settings: Settings) -> Decisions:
    """The order of neurons in each layer, as tables, and the routers' rows, as an extra source;
    what an earlier run of the same command finished is taken up.
    """
    batches = calibration(text, settings).read(ground.source)
    folder, told = Path(settings.work) / "walk", json.dumps(["matter", asdict(cut), ground.layers])
    seal = profiling.digest(ground.source, batches, Wanted(len(batches.files)), told)
    profiling.claim(folder, seal)
    walk = Kept(
        ground.source,
        batches,
        Budget(settings.memory, folder, settings.device, extra=_held(ground, cut, batches)),
        tell=settings.tell,
        stop=settings.stop,
        name="carve",
    )
    weigher = Weigher(ground, cut, folder)
    if not weigher.done:
        walk.run(watch=Clusters(ground, cut, batches.total, folder))
        Back(walk).run(weigher.ends, weigher.see)
        walk.hidden.clear()
    tables = {carve.order_name(layer): weigher.kept(layer) for layer in ground.layers}
    report = {"tokens": batches.total, "warnings": list(batches.notes)}
    return Decisions(tables, report, walk.peak, extra=(solved_source(folder),))


def _held(ground: Ground, cut: Parting, batches: Batches) -> int:
    """Bytes beside a layer: what is clustered with scikit-learn, the way back, the scores."""
    experts = cut.split - cut.shared
    tokens = min(2 * CLUSTERED, batches.total)
    points = carve.CLUSTER_RESERVE + tokens * (20 * ground.hidden + 48 * experts)
    scores = 16 * ground.width * experts * 8
    return points + scores + held(ground.source, batches, ground.hidden, ground.width)


class Clusters:
    """Sees what goes into each FFN, and keeps the centres of its clusters (linears.Observer)."""

    changes, again, gates = False, False, 0

    def __init__(self, ground: Ground, cut: Parting, total: int, folder: Path) -> None:
        self.ground, self.cut, self.folder = ground, cut, folder
        self.every = max(1, total // CLUSTERED)
        self.first, self.seen = "", 0
        self.rows: list[np.ndarray] = []

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        self.rows, self.seen = [], 0
        used = layer in self.ground.layers
        self.first = _ends(self.ground, layer).first if used else ""

    def inputs(self, linear: Linear, x: Tensor) -> None:
        if linear.key == self.first:
            self.rows.append(x[-self.seen % self.every :: self.every].float().cpu().numpy())
            self.seen += len(x)

    def end(self, layer: int, block: Block | None) -> Mapping[str, Tensor]:
        if self.rows:
            points, experts = np.concatenate(self.rows), self.cut.split - self.cut.shared
            if len(points) < experts:
                raise MoetoolError(
                    "the text has too few tokens to cluster",
                    expected=f"{experts} or more",
                    found=f"{len(points)}",
                    hint="raise --tokens",
                )
            found = cluster.loose_centres(points, experts, SLACK, self.cut.seed)
            centres = torch.from_numpy(found).to(codec.torch_dtype(self.ground.dtype))
            solve.save(self.folder, layer, {carve.centres_name(layer): centres})
            self.rows = []
        return {}


class Weigher:
    """Cuts each FFN on the way back."""

    def __init__(self, ground: Ground, cut: Parting, folder: Path) -> None:
        self.ground, self.cut, self.folder = ground, cut, folder

    @property
    def done(self) -> bool:
        return all(self._file(layer).exists() for layer in self.ground.layers)

    def kept(self, layer: int) -> list[int]:
        """The order that was found for a layer."""
        found: list[int] = json.loads(self._file(layer).read_text())
        return found

    def ends(self, layer: int) -> Ends:
        return _ends(self.ground, layer)

    def see(self, layer: int, seen: Iterator[FfnPass]) -> None:
        """A layer's tokens."""
        if layer not in self.ground.layers:
            for _ in seen:
                pass
            return
        centres = solve.kept(self.folder, layer)[carve.centres_name(layer)].float()
        scores: importance.Importance | None = None
        for one in seen:
            if scores is None:
                scores = importance.Importance(centres.to(one.x.device), self.ground.width)
            scores.add(one.x, one.h, one.gradient)
        assert scores is not None
        made = importance.order(scores.means(), self.cut.split, self.cut.shared)
        atomic.write(self._file(layer), json.dumps(made.tolist()))

    def _file(self, layer: int) -> Path:
        return self.folder / f"note-{layer:05d}.json"


def _ends(ground: Ground, layer: int) -> Ends:
    linears = {one.role: ground.stored(one, layer).name for one in ground.block.linears}
    first = linears.get("gate_up") or linears.get("gate") or linears["up"]
    return Ends(first, linears["down"])
