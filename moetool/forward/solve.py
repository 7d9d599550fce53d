"""The loop of everything that solves for weights, layer after layer: walk a layer, show it, let it
be changed, keep what was solved, go on. A run that was stopped or killed goes on after the last
layer that was kept, and ends with the same bytes.

It knows no experts and no methods. What is solved lies in the work folder:
`solved-LAYER.safetensors` (tensors, for the plan to read) and `note-LAYER.json` (small numbers, and
the sha256 of the tensors).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from moetool import atomic
from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.forward.batches import Batches
from moetool.forward.block import Block
from moetool.forward.catch import Look
from moetool.forward.linears import Linear
from moetool.forward.profile import claim
from moetool.forward.walk import Budget, Walk
from moetool.progress import Progress, silent
from moetool.surgery.checkpoint import Checkpoint

Tensor = torch.Tensor
CHUNK = 1 << 20


@dataclass(frozen=True)
class Solved:
    """What a solver makes of a layer. note: plain data that a resumed run gets back; tensors: kept
    beside it, for the plan; weights: new matrices [out, in] by `Linear.key`, and block: another MoE
    block, with which the walk goes on (the very values that will be written). again: the layer is
    not done, it is shown once more with these weights (note and tensors then count for nothing).
    """

    note: JsonObject = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    block: Block | None = None
    again: bool = False


class Solver(Protocol):
    """Solves one layer after the other. `linears`: it wants to see the linears of every layer (at
    work, through `inputs`); otherwise only MoE blocks come to it, and `look` sees them at work.
    """

    linears: bool
    changes: bool  # linears.Observer
    look: Look | None
    gates: int  # linears.Observer

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        """The linears of a layer that now comes, or comes again."""
        ...

    def inputs(self, linear: Linear, x: Tensor) -> None:
        """What a linear sees (linears.Observer)."""
        ...

    def solve(self, layer: int, block: Block | None) -> Solved:
        """The layer's solution, when all text went through it. block: its MoE block."""
        ...


@dataclass(frozen=True)
class Work:
    """Where a loop works, and with what. `seal` names everything that decides its numbers: a folder
    with another seal is not taken up. `held`: bytes that the solver holds for a layer.
    """

    folder: Path
    seal: str
    held: int = 0
    memory: int | None = None
    device: str = "cpu"
    tell: Progress = silent
    stop: threading.Event | None = None
    name: str = "propagate"


@dataclass(frozen=True)
class Layers:
    """The notes of all layers that were solved, by number, and the promised peak in bytes."""

    notes: dict[int, JsonObject]
    peak: int


def solve(source: Checkpoint, batches: Batches, work: Work, solver: Solver) -> Layers:
    """Solve every layer, or those that an earlier run did not. Raises MoetoolError where what was
    kept is damaged, Stopped when `work.stop` is set.
    """
    claim(work.folder, work.seal)
    finished = work.folder / "done.json"
    if not finished.exists():  # else killed while the output was written: nothing is solved anew
        kept = _Kept(work.folder, solver)
        walking = Walk(
            source,
            batches,
            Budget(work.memory, work.folder, work.device, solver.linears, work.held),
            tell=work.tell,
            stop=work.stop,
            name=work.name,
        )
        if solver.linears:
            walking.run(solver.look, kept.block, kept)
        else:
            walking.run(solver.look, kept.change)
        layers = list(range(len(walking.shell.layers))) if solver.linears else walking.mixtures
        atomic.write(finished, json.dumps({"peak": walking.peak, "layers": layers}))
        walking.hidden.clear()
    peak, layers = _done(work.folder, finished)
    return Layers(_notes(work.folder, layers), peak)


def _done(folder: Path, file: Path) -> tuple[int, list[int]]:
    """The promised peak, and the layers that were solved."""
    try:
        said = json.loads(file.read_text())
        return int(said["peak"]), [int(layer) for layer in said["layers"]]
    except (ValueError, TypeError, KeyError):
        raise _damaged(folder, file, "an object with peak and layers") from None


class _Kept:
    """Between the walk and a solver: keeps what was solved before the walk goes on."""

    def __init__(self, folder: Path, solver: Solver) -> None:
        self.folder, self.solver, self.gates = folder, solver, solver.gates
        self.changes = solver.changes
        self.last = Solved()

    def change(self, layer: int, block: Block) -> Block | None:
        """For solvers that see blocks alone."""
        return self._solved(layer, block).block

    def block(self, layer: int, block: Block) -> Block | None:
        """The block of a layer that was just solved, where linears were seen as well."""
        return self.last.block

    @property
    def again(self) -> bool:
        return self.last.again

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        self.solver.begin(layer, linears)

    def inputs(self, linear: Linear, x: Tensor) -> None:
        self.solver.inputs(linear, x)

    def end(self, layer: int, block: Block | None) -> Mapping[str, Tensor]:
        self.last = self._solved(layer, block)
        return self.last.weights

    def _solved(self, layer: int, block: Block | None) -> Solved:
        made = self.solver.solve(layer, block)
        if made.again:
            return made
        seal = save(self.folder, layer, made.tensors) if made.tensors else ""
        body = json.dumps({"note": made.note, "sha256": seal})
        atomic.write(self.folder / f"note-{layer:05d}.json", body)
        return made


def _notes(folder: Path, layers: Sequence[int]) -> dict[int, JsonObject]:
    """What was kept of the layers that were solved; tensors must be those that were solved."""
    notes = {}
    for layer in layers:
        kept, file = _note(folder, layer), place(folder, layer)
        seal = kept["sha256"]
        if seal and (not file.exists() or digest(file) != seal):
            raise _damaged(folder, file, f"sha256 {seal[:12]}...", layer)
        notes[layer] = kept["note"]
    return notes


def _note(folder: Path, layer: int) -> JsonObject:
    """What `_Kept` wrote of a layer, whole and as it was written."""
    path, lacks = folder / f"note-{layer:05d}.json", "an object with note and sha256"
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):  # gone, or no JSON
        raise _damaged(folder, path, lacks, layer) from None
    whole = isinstance(kept, dict) and isinstance(kept.get("note"), dict)
    if not whole or not isinstance(kept.get("sha256"), str):
        raise _damaged(folder, path, lacks, layer)
    return dict(kept)


def _damaged(folder: Path, file: Path, expected: str, layer: int | None = None) -> MoetoolError:
    return MoetoolError(
        "what was solved for a layer is damaged",
        file=file,
        tensor=None if layer is None else f"layer {layer}",
        expected=expected,
        found="something else" if file.exists() else "no such file",
        hint=f"remove {folder} and run the same command again",
    )


def place(folder: Path, layer: int) -> Path:
    """The file of a layer's solved tensors."""
    return folder / f"solved-{layer:05d}.safetensors"


def save(folder: Path, layer: int, tensors: Mapping[str, Tensor]) -> str:
    """Write what was solved of a layer; returns the file's sha256. The same bytes keep their file
    (a plan that is under way reads it).
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = place(folder, layer)
    with atomic.writing(path, keep_same=True) as temporary:
        save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, temporary)
    return digest(path)


def kept(folder: Path, layer: int) -> dict[str, Tensor]:
    """What was solved of a layer; empty where nothing was."""
    from safetensors.torch import load_file

    path = place(folder, layer)
    return load_file(path) if path.exists() else {}


def digest(path: Path) -> str:
    """sha256 of a file."""
    seal = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            seal.update(chunk)
    return seal.hexdigest()
