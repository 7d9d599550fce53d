"""Rounding inside the walk: every layer's matrices are solved on what the rounded layers below give
it, and go on as they will be written.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.forward import profile as profiling
from moetool.forward.batches import Batches, Cut
from moetool.forward.block import Block
from moetool.forward.catch import Look
from moetool.forward.linears import Grams, Linear
from moetool.forward.needs import needs
from moetool.forward.own import Running
from moetool.forward.profile import Calibration
from moetool.forward.solve import Layers, Solved, Work
from moetool.forward.solve import solve as solve_layers
from moetool.forward.stats import Wanted
from moetool.kernels import codec, gptq, rounding
from moetool.kernels.rounding import Rounded
from moetool.methods.contract import Decisions
from moetool.methods.quantize import grids, solved
from moetool.methods.quantize.choice import Choice
from moetool.methods.quantize.options import Quantizing
from moetool.methods.quantize.parts import turns
from moetool.methods.quantize.parts.turns import Part, Turn, Unit
from moetool.methods.quantize.way import ToRound
from moetool.surgery import forms
from moetool.surgery.spec import Target

Tensor = torch.Tensor
HESSIANS = ("own", "gate", "gate2")  # by the power of the gate weight
COUNTED = ("solved", "experts_without_tokens", "experts_with_few_tokens")


def decisions(job: ToRound, verb: Quantizing, own: JsonObject) -> Decisions:
    """Solve every layer; what an earlier run of the same command finished is taken up."""
    batches = _text(job, verb)
    held = turns.Held.of(job.choice)
    room, folder = _room(job, batches, held), Path(job.settings.work) / "walk"
    work = Work(
        folder,
        _seal(job, batches, own),
        room + held.beside,
        job.settings.memory,
        job.settings.device,
        job.settings.tell,
        job.settings.stop,
        "solve",
    )
    made = solve_layers(job.source, batches, work, Rounder(job.choice, own, room))
    source = solved.source(folder, job.choice)
    rest = [name for name in job.choice.formats if name not in source.tensors]
    return Decisions(
        report=_found(made, batches, rest, job.choice), memory=made.peak, extra=(source,)
    )


def _text(job: ToRound, verb: Quantizing) -> Batches:
    """The calibration text; refused where it cannot be enough."""
    cut = Cut(verb.tokens, verb.seq_len, verb.pack, True, job.settings.seed, verb.batch_tokens)
    told = Calibration(verb.calibrate, cut, verb.text_field, verb.trust_remote_code)
    settings = job.settings
    told = replace(told, running=Running(settings.memory, settings.device, settings.tell))
    batches = told.read(job.source)
    least = min(job.choice.matrices[name].shape[-1] for name in job.choice.formats)
    if batches.total < least:
        raise MoetoolError(
            "there is too little text to solve for any matrix",
            expected=f"at least {least:,} tokens: the narrowest input",
            found=f"{batches.total:,}",
            hint="give more text (--calibrate, --tokens), or use --method rtn, which needs none",
        )
    return batches


def _room(job: ToRound, batches: Batches, held: turns.Held) -> int:
    """Bytes of Hessians held at once: all of a layer's, or what --memory leaves for them."""
    limit = job.settings.memory
    if limit is None:
        return held.all
    least = needs(job.source, batches, extra=held.beside).least(widened=True)
    return max(held.least, min(held.all, limit - least))


def _seal(job: ToRound, batches: Batches, own: JsonObject) -> str:
    """Names everything that decides what is solved."""
    formats = {name: [a.form, a.params] for name, a in job.choice.formats.items()}
    told = json.dumps(["quantize", own, formats], sort_keys=True)
    return profiling.digest(job.source, batches, Wanted(len(batches.files)), told)


def _found(made: Layers, batches: Batches, rest: Sequence[str], choice: Choice) -> JsonObject:
    """What the report says; `rest` was not solved for."""
    counted = {key: sum(note[key] for note in made.notes.values()) for key in COUNTED}
    lost = set(grids.without(choice))
    unseen = [name for name in rest if name not in lost]
    warnings = [*batches.notes, *_gridless(choice, lost), *_warnings(counted, unseen)]
    return {"tokens": batches.total, "warnings": warnings, "rounded": len(rest)} | counted


def _gridless(choice: Choice, lost: Collection[str]) -> Iterator[str]:
    if lost:
        said = grids.unsolvable(choice.formats[name] for name in lost)
        yield f"{said}: {len(lost)} matrices were rounded as --method rtn does"


def _warnings(counted: Mapping[str, int], rest: Sequence[str]) -> Iterator[str]:
    if rest:
        more = ", ..." if len(rest) > 2 else ""
        yield (
            f"{len(rest)} matrices see no text in a layer and were rounded as --method rtn does: "
            f"{', '.join(rest[:2])}{more}"
        )
    few, none = counted["experts_with_few_tokens"], counted["experts_without_tokens"]
    if few:
        yield (
            f"{_experts(few)} saw fewer tokens than inputs: what came was mixed with "
            "what the others of the layer saw (more --tokens would help)"
        )
    if none:
        yield f"{_experts(none)} saw no token: rounded as --method rtn does"


def _experts(count: int) -> str:
    return f"{count} expert" if count == 1 else f"{count} experts"


class Rounder:
    """Solves a layer's matrices, in one turn or several (forward/solve.py)."""

    linears = changes = True

    def __init__(self, choice: Choice, own: JsonObject, room: int) -> None:
        self.choice, self.own, self.room = choice, own, room
        self.gates = HESSIANS.index(own["hessian"])
        self.look: Look | None = None
        self.turns: list[Turn] = []  # of the layer at work, those that are still to come
        self.parts: list[Part] = []  # of that layer, solved
        self.keys: set[str] = set()
        self.grams = Grams(torch.float32)
        self.note = dict.fromkeys(COUNTED, 0)
        self.tensors: dict[str, Tensor] = {}

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        if not self.turns:
            self.turns = turns.of(linears, self.choice, self.room)
            self.note, self.tensors, self.parts = dict.fromkeys(COUNTED, 0), {}, []
        self.keys = {part.linear.key for part in chain.from_iterable(self.turns[0])}
        self.grams.begin(layer, linears)

    def inputs(self, linear: Linear, x: Tensor) -> None:
        if linear.key in self.keys:
            self.grams.inputs(linear, x)

    def solve(self, layer: int, block: Block | None) -> Solved:
        for chunk in self.turns.pop(0):
            self.parts += chunk
            leads = {p.linear.key: self.grams.lead(p.linear.key) for p in chunk}
            for alike in turns.units(chunk, leads):
                self._solve([u for u in alike if self.grams.tokens(u.lead)])
                self._round([u for u in alike if not self.grams.tokens(u.lead)])
        if self.turns:  # nothing is put in its place yet: all turns see the same
            return Solved(again=True)
        weights = Decoded(self.parts, self.choice, self.tensors)
        return Solved({**self.note}, self.tensors, weights)

    def _solve(self, units: Sequence[Unit]) -> None:
        """Units that are alike, each on the inputs it saw."""
        if not units:
            return
        hessians = torch.stack([self.grams.gram(u.lead) for u in units])
        tokens = torch.tensor([self.grams.tokens(u.lead) for u in units]).to(hessians.device)
        damping = self.own["damping"] or gptq.damping_for(tokens, hessians.shape[-1])
        if units[0].parts[0].linear.expert is not None:
            hessians = gptq.shrunk(hessians, tokens)
        grid = _grid(units[0])
        self._keep(units, gptq.solve(_weights(units).to(hessians), hessians, grid, damping=damping))
        for unit in units:
            first = unit.parts[0].linear
            few = self.grams.tokens(unit.lead) < first.shape[1]
            self.note["experts_with_few_tokens"] += few and first.role == "down"
        self.note["solved"] += sum(len(u.parts) for u in units)

    def _round(self, units: Sequence[Unit]) -> None:
        """Units that saw nothing."""
        if units:
            self._keep(units, rounding.searched(_weights(units), _grid(units[0])))
            alone = [u for u in units if u.parts[0].linear.role == "down"]
            self.note["experts_without_tokens"] += len(alone)

    def _keep(self, units: Sequence[Unit], made: Rounded) -> None:
        for number, unit in enumerate(units):
            row = 0
            for part in unit.parts:
                rows = slice(row, row + part.rows)
                row += part.rows
                one = Rounded(made.codes[number, rows], made.scales[number, rows])
                form = forms.named(part.format.form)
                packed = form.pack(one, part.format.params)
                for target, value in zip(self._lying(part), packed, strict=True):
                    self.tensors[target.name] = value.to(codec.torch_dtype(target.dtype))

    def _lying(self, part: Part) -> Sequence[Target]:
        return solved.parts(part.matrix, self.choice)


def _grid(unit: Unit) -> forms.Grid:
    asked, shape = unit.parts[0].format, unit.parts[0].matrix.shape
    grid = forms.named(asked.form).grid(shape, asked.params)
    assert grid is not None
    return grid


def _weights(units: Sequence[Unit]) -> Tensor:
    """[units, out, in], float32."""
    return torch.stack([torch.cat([p.weight for p in unit.parts]) for unit in units])


class Decoded(Mapping[str, Tensor]):
    """What was solved, by the key of its linear: decoded when somebody asks."""

    def __init__(
        self, parts: Sequence[Part], choice: Choice, tensors: Mapping[str, Tensor]
    ) -> None:
        self.choice, self.tensors = choice, tensors
        self.parts: dict[str, list[Part]] = {}
        for part in parts:
            self.parts.setdefault(part.linear.key, []).append(part)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __contains__(self, key: object) -> bool:
        return key in self.parts

    def __getitem__(self, key: str) -> Tensor:
        """[out, in]; rows that nothing was solved for are as they were."""
        own = self.parts[key]
        made = own[0].linear.weight.clone()
        for part in own:
            form = forms.named(part.format.form)
            held = [self.tensors[t.name] for t in solved.parts(part.matrix, self.choice)]
            made[part.row : part.row + part.rows] = form.decode(held, part.format.params)
        return made
