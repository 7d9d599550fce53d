"""Down matrices solved again once all layers are decided: text goes through the reduced model,
layer by layer, and each layer is brought near to what it gave before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from moetool.forward import finite
from moetool.forward import profile as profiling
from moetool.forward.batches import Batches
from moetool.forward.block import Block
from moetool.forward.catch import Look
from moetool.forward.linears import Linear
from moetool.forward.solve import Solved, Work, save
from moetool.forward.solve import solve as solve_layers
from moetool.forward.stats import Wanted
from moetool.forward.taken import Taken
from moetool.kernels import codec, form, solve
from moetool.methods.reduce import beside, cost, left_out, lines
from moetool.methods.reduce.asked import Asked, Evidence, Settled
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.facts import Refitted
from moetool.methods.reduce.left_out import Parts
from moetool.surgery import reform

if TYPE_CHECKING:
    from moetool.forward.stats import Profile


@dataclass(frozen=True)
class Lesson:
    """What a layer was given, x [tokens, hidden], and what its routed experts made of it,
    `target` [tokens, hidden].
    """

    x: torch.Tensor
    target: torch.Tensor

    def where(self, mask: torch.Tensor) -> Lesson:
        """Of the tokens of a mask [tokens] alone."""
        at = mask.to(self.x.device)
        return Lesson(self.x[at], self.target[at])


class Solution(NamedTuple):
    """A block whose down matrices were solved, those as the output will hold them, and how near
    it came.
    """

    block: Block
    tensors: dict[str, torch.Tensor]
    error: Refitted


class Refitting:
    """Solves the decided layers (forward/solve.py); each sees what the solved ones below give."""

    linears, changes, gates = False, True, 0

    def __init__(
        self, asked: Asked, seen: Evidence, layers: Mapping[int, Decision], parts: Parts
    ) -> None:
        self.asked, self.profile, self.layers, self.parts = asked, seen.profile, layers, parts
        self.taken = Taken()
        self.look: Look | None = self.taken

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        """Not asked for."""

    def inputs(self, linear: Linear, x: torch.Tensor) -> None:
        """Not asked for."""

    def solve(self, layer: int, block: Block | None) -> Solved:
        """The layer's new block, solved."""
        assert block is not None
        stats = self.profile.layer(layer) if self.profile is not None else None
        view = self.asked.view(layer, stats)
        view.read_block = lambda: block
        new = self.asked.way.block(view, self.layers[layer], block)
        made = refitted(self.asked, layer, new, Lesson(self.taken.x, self.taken.made), self.parts)
        return Solved({"refit": asdict(made.error)}, made.tensors, block=made.block)


def refit(asked: Asked, seen: Evidence, settled: Settled) -> Settled:
    """The decided layers solved on --refit-tokens of the text."""
    batches = asked.solved_on()
    settings, folder, source = asked.settings, asked.work / "walk", asked.mixture.source
    layers = {n: settled.layers[n] for n in asked.mixture.layers}
    told = [
        asked.verb,
        asked.way.called,
        asdict(asked.options),
        asdict(asked.way.own),
        {str(n): d.as_json() for n, d in layers.items()},
    ]
    work = Work(
        folder,
        profiling.digest(source, batches, Wanted(), json.dumps(told, sort_keys=True)),
        _held(asked, batches),
        settings.memory,
        settings.device,
        settings.tell,
        settings.stop,
        "refit",
    )
    made = solve_layers(source, batches, work, Refitting(asked, seen, layers, Parts.of(batches)))
    errors = {n: Refitted(**note["refit"]) for n, note in made.notes.items()}
    found = replace(
        settled.found,
        refit=errors,
        refit_tokens=batches.total,
        refit_files=batches.described,
        refit_work=_work(asked, seen, batches.total),
    )
    found = replace(found, warnings=(*found.warnings, *lines.narrow(found)))
    extra = (*settled.extra, beside.solved_source(folder))
    return replace(
        settled, found=found, extra=extra, memory=max(settled.memory, made.peak, batches.peak)
    )


def _work(asked: Asked, seen: Evidence, tokens: int) -> float:
    """Of solving and its walk, in units of the walk that decided; 0 where none did."""
    if seen.data is None:
        return 0.0
    return cost.times(asked.mixture, asked.kept, seen.data.tokens, tokens)


def _held(asked: Asked, batches: Batches) -> int:
    """Bytes held beside a layer: the changed block beside the old one, and what solving holds."""
    mixture = asked.mixture
    changed = 4 * mixture.experts * mixture.expert_elements(mixture.layers[0])
    return changed + asked.way.buffers(mixture) + solving_bytes(asked, batches.total)


def solving_bytes(asked: Asked, tokens: int) -> int:
    """Bytes that solving a layer on so many tokens holds: its input and output, what is left of
    it, what each kept expert sees, the gate and up products of an expert at work (it may see all
    tokens), and the normal equations.
    """
    mixture = asked.mixture
    hidden = int(mixture.layout.field("hidden", mixture.text_model.config))
    width = mixture.width(mixture.layers[0])
    held = 4 * tokens * (6 * hidden + (mixture.top_k + 3) * width)
    square = width * width
    return (
        held
        + 4 * asked.kept * square
        + 3 * max(8 * square, min(solve.STACK, 8 * asked.kept * square))
    )


def refit_from(asked: Asked, profile: Profile, settled: Settled) -> Settled:
    """Solution on the sample that a profile kept (the layers below unchanged)."""
    folder, errors, tokens = asked.work / "solved", {}, 0
    for number in asked.mixture.layers:
        view = asked.view(number, profile.layer(number))
        new = asked.way.block(view, settled.layers[number], view.block)
        x = view.sample.to(view.block.router.device)
        made = refitted(asked, number, new, seen_by(view.block, x))
        errors[number], tokens = made.error, len(x)
        save(folder, number, made.tensors)
    found = replace(settled.found, refit=errors, refit_tokens=tokens)
    return replace(settled, found=found, extra=(beside.solved_source(folder),))


def seen_by(block: Block, x: torch.Tensor) -> Lesson:
    """x [tokens, hidden] with what the block makes of it."""
    return Lesson(x, block.routed(x, block.route(x)))


def refitted(
    asked: Asked, layer: int, new: Block, seen: Lesson, parts: Parts | None = None
) -> Solution:
    """The new block with its down matrices solved so that it puts out what the old one did, on
    the tokens of `parts` that are to be solved on (None: all). It continues with exactly the
    (rounded) values that are written.
    """
    fit = seen if parts is None else seen.where(parts.fit)
    try:
        made = solve.refit(fit.x, new.route(fit.x), new.experts, new.law, fit.target)
    except ArithmeticError:
        raise finite.broken(asked.mixture.source.folder, layer, "activations") from None
    stored = _as_stored(asked, layer, made.down)
    tensors = {beside.solved_name(layer, j, "down"): t for j, t in enumerate(stored)}
    turned = asked.mixture.orientation(layer)["transposed"]
    old, own = new.experts.down, asked.mixture.pieces(layer, 0)["down"].name
    kept = [reform.held(asked.mixture.source.tensor(own), t, asked.options.form) for t in stored]
    rounded = torch.stack([(t.T if turned else t).to(old) for t in kept])
    solved = replace(new, experts=replace(new.experts, down=rounded))
    out = parts.out if parts is not None else {}
    apart = {
        kind: left_out.lost((new, solved), at.x, at.target)
        for kind, at in ((k, seen.where(w)) for k, w in out.items())
    }
    error = Refitted(float(f"{made.before:.4g}"), float(f"{made.after:.4g}"), made.few, apart)
    return Solution(solved, tensors, error)


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
