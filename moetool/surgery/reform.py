"""From a plan over matrices to a plan over bytes: which parts are copied, what is decoded before
it is computed with, and in which form each output lies.

Methods plan as if every matrix lay whole in its file. Here each target gets a form:

auto  every matrix keeps its form where all that touches one only moves it (its parts are then
      copied byte for byte); otherwise the whole output is full, so that a loader meets one form
same  every matrix keeps its form, and what was computed is encoded again
full  everything is decoded

`into` says it for single targets, before all of that (`quantize`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.kernels import turn
from moetool.surgery import forms, spellings
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms.form import Form, Kin, Written
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import FLOATS, InParts, Piece, Stored, Target, Task

if TYPE_CHECKING:
    from torch import Tensor

FORMS = ("auto", "same", "full")
Makers = list[tuple[Task, Piece]]  # the tasks that make a target, each with the piece it makes


@dataclass(frozen=True)
class Into:
    """The form that one target is written in. `rounding`: how (see `forms.encoded`); empty: as the
    form itself rounds. `kept`: the params are what a source's own matrix has.
    """

    form: str
    params: JsonObject = field(default_factory=dict)
    rounding: JsonObject = field(default_factory=dict)
    kept: bool = False

    def parts(self, target: Target) -> InParts:
        """As what `Stored.parts` says of a matrix, no tensors named."""
        params = self.params
        if not self.kept:
            params = forms.named(self.form).settled(target, params)
        return InParts(self.form, (), params)


def plan(
    sources: Sequence[Checkpoint],
    wanted: Outputs,
    *,
    max_shard: int,
    tables: dict[str, list[int]] | None = None,
    form: str = "auto",
    into: Mapping[str, Into] | None = None,
) -> Plan:
    """The plan that writes what is wanted, its config spelled for every client; `form` is auto,
    same or full. `into`: a form by target name.
    """
    wanted = replace(wanted, config=spellings.completed(wanted.config))
    if into or any(s.told for s in sources):
        wanted = _Reform(sources, wanted, form, into or {}).lowered()
    fingerprints = [s.fingerprint() for s in sources]
    return Plan.build(fingerprints, wanted, max_shard=max_shard, tables=tables)


class _Reform:
    """Decides every target's form, then rewrites targets, tasks, drops and config."""

    def __init__(
        self,
        sources: Sequence[Checkpoint],
        wanted: Outputs,
        form: str,
        into: Mapping[str, Into],
    ) -> None:
        self.sources, self.wanted, self.into = sources, wanted, into
        self.makers = makers = dict[str, Makers]()
        for task in wanted.tasks:
            for out in task.outputs:
                makers.setdefault(out.name, []).append((task, out))
        choose = {"auto": self._kept, "same": self._same, "full": _full}[form]
        chosen = {t.name: choose(t, makers.get(t.name, [])) for t in wanted.targets}
        if form == "auto" and any(
            chosen[t.name] is None and self._touched(t, makers.get(t.name, []))
            for t in wanted.targets
        ):
            chosen = dict.fromkeys(chosen)
        self.targets = {t.name: t for t in wanted.targets}
        chosen |= {name: asked.parts(self.targets[name]) for name, asked in into.items()}
        self.chosen = {name: like for name, like in chosen.items() if like is not None}
        self._copied: set[tuple[str, int]] = set()

    def _matrix(self, piece: Piece) -> Stored:
        return self.sources[piece.source].tensor(piece.name)

    def _namesake(self, target: Target) -> InParts | None:
        """What the source's own matrix of this name is made of."""
        found = self.sources[0].tensors.get(target.name)
        return found.parts if found else None

    def _touched(self, target: Target, made: Makers) -> bool:
        """Whether anything that is not full goes into a target, or once stood in its place."""
        return self._namesake(target) is not None or any(
            self._matrix(p).parts for p in _inputs(made)
        )

    def _kept(self, target: Target, made: Makers) -> InParts | None:
        """The form that a target has when all its parts are only moved."""
        likes: list[InParts | None] = []
        for task, out in made:
            if task.op == "zeros":
                continue
            if task.op != "copy":
                return None
            likes.append(self._matrix(task.inputs[task.outputs.index(out)]).parts)
        like = self._one_of(likes or [self._namesake(target)])
        if like is None or not forms.named(like.form).fits(target, like.params):
            return None
        moved = all(self._moves(task, target, out, like) for task, out in made)
        return like if moved else None

    def _moves(self, task: Task, target: Target, out: Piece, like: InParts) -> bool:
        """Whether a copy of a matrix can be made by copying runs of its parts."""
        to = self._pieces_of(target, out, like)
        if to is None or task.op == "zeros":
            return to is not None
        piece = task.inputs[task.outputs.index(out)]
        own = forms.named(like.form).pieces(
            self._matrix(piece).lying, self._matrix(piece).shape, piece, like.params
        )
        return own is not None and [p.count for p in own] == [p.count for p in to]

    def _same(self, target: Target, made: Makers) -> InParts | None:
        """The form of what goes into a target, where it can hold it."""
        if target.dtype not in FLOATS:
            return None
        likes = [self._matrix(p).parts for p in _inputs(made)]
        like = self._one_of([p for p in likes if p] or [self._namesake(target)])
        if like is None or not forms.named(like.form).fits(target, like.params):
            return None
        if not forms.named(like.form).alone and self._kept(target, made) is None:
            raise MoetoolError(
                f"{like.form} matrices that are computed cannot be written in that form again",
                file=self.sources[0].folder,
                tensor=target.name,
                expected="--form full",
                found="--form same",
                hint="leave out --form: everything is then written in full",
            )
        fits = all(self._pieces_of(target, out, like) is not None for _, out in made)
        return like if fits else None

    @staticmethod
    def _one_of(likes: Sequence[InParts | None]) -> InParts | None:
        """The form that all have in common."""
        keys = {like and (like.form, json.dumps(like.params, sort_keys=True)) for like in likes}
        return likes[0] if len(keys) == 1 else None

    @staticmethod
    def _pieces_of(target: Target, out: Piece, like: InParts) -> tuple[Piece, ...] | None:
        form = forms.named(like.form)
        return form.pieces(form.parts(target, like.params), target.shape, out, like.params)

    def lowered(self) -> Outputs:
        """Targets, tasks, drops and config in terms of what lies in files."""
        targets: dict[str, Target] = {}
        for target in self.wanted.targets:
            like = self.chosen.get(target.name)
            parts = forms.named(like.form).parts(target, like.params) if like else (target,)
            targets |= {p.name: p for p in parts if p.name not in targets}
        tasks = list(chain.from_iterable(map(self._task, self.wanted.tasks)))
        dropped = self._dropped(tasks)
        return replace(
            self.wanted,
            config=self._config(),
            targets=list(targets.values()),
            tasks=tasks,
            dropped=dropped,
        )

    def _task(self, task: Task) -> Iterator[Task]:
        if task.op in ("copy", "zeros"):
            for number, out in enumerate(task.outputs):
                yield from self._moved(task.op, task.inputs[number : number + 1], out)
            return
        moved = self._rows_moved(task)
        yield moved or self._computed(task.op, task.inputs, task.outputs, task.params)

    def _rows_moved(self, task: Task) -> Task | None:
        """The same operation on the parts of a matrix, where it only puts rows in another order
        and the form stays: what was solved is not rounded again.
        """
        if task.op != "turn" or task.params["turn"][0] not in turn.ROWS:
            return None
        (piece,), (out,) = task.inputs, task.outputs
        like, held = self.chosen.get(out.name), self._matrix(piece).parts
        if like is None or held is None or not self._one_of([like, held]):
            return None
        own = forms.named(like.form).pieces(
            held.tensors, self._matrix(piece).shape, piece, held.params
        )
        to = self._pieces_of(self.targets[out.name], out, like)
        if own is None or to is None or len(to) != 1:
            return None
        return Task(task.op, own, to, task.params)

    def _moved(self, op: str, inputs: tuple[Piece, ...], out: Piece) -> Iterator[Task]:
        """A copy of the parts where the form stays; else the matrix decoded, or encoded."""
        like, target = self.chosen.get(out.name), self.targets[out.name]
        held = self._matrix(inputs[0]).parts if inputs else None
        if like is None and held is None:
            yield Task(op, inputs, (out,))
            return
        if like is None and held and self._lies_apart(held, target):
            yield from self._run_by_run(inputs[0], out)
            return
        if like is None or (
            inputs
            and not (
                self._one_of([like, held])
                and self._moves(Task(op, inputs, (out,)), target, out, like)
            )
        ):
            yield self._computed("reform", (*inputs, *self._beside(out, like)), (out,), {})
            return
        outs = self._pieces_of(target, out, like)
        assert outs is not None
        own = forms.split(self._matrix(inputs[0]), inputs[0])[0] if inputs else ()
        for number, piece in enumerate(outs):
            own_task = piece.name in self.targets and piece.name != out.name  # a shared base
            if not own_task and (piece.name, piece.offset) not in self._copied:
                self._copied.add((piece.name, piece.offset))
                yield Task(op, own[number : number + 1], (piece,))

    @staticmethod
    def _lies_apart(held: InParts, target: Target) -> bool:
        """Whether the bytes of a matrix are those of the target, in runs of other tensors."""
        return forms.named(held.form).moves and held.tensors[0].dtype == target.dtype

    def _run_by_run(self, piece: Piece, out: Piece) -> Iterator[Task]:
        """A copy of each run that a matrix lies in."""
        at = out.offset
        for run in forms.split(self._matrix(piece), piece)[0]:
            yield Task("copy", (run,), (Piece(out.name, run.shape, at),))
            at += run.count

    def _beside(self, out: Piece, like: InParts | None) -> Iterator[Piece]:
        """What else a matrix must be seen with to be encoded: others that get the same form."""
        for name in forms.named(like.form).beside(out.name) if like else ():
            other = self.chosen.get(name)
            if other and like and other.form == like.form:
                yield from (t.inputs[t.outputs.index(p)] for t, p in self.makers.get(name, ()))

    def _computed(
        self, op: str, inputs: Sequence[Piece], outputs: Sequence[Piece], params: JsonObject
    ) -> Task:
        """An operation with what is decoded before it and encoded behind it."""
        split = [forms.split(self._matrix(p), p) for p in inputs]
        decode = [how for _, how in split]
        encode: list[JsonObject | None] = []
        outs: list[Piece] = []
        for out in outputs:
            like = self.chosen.get(out.name)
            pieces = self._pieces_of(self.targets[out.name], out, like) if like else None
            outs += pieces or (out,)
            encode.append(self._encode(out, like, len(pieces)) if like and pieces else None)
        how = {"decode": decode if any(decode) else None, "encode": encode if any(encode) else None}
        return Task(
            op,
            tuple(chain.from_iterable(parts for parts, _ in split)),
            tuple(outs),
            params | {k: v for k, v in how.items() if v},
        )

    def _encode(self, out: Piece, like: InParts, parts: int) -> JsonObject:
        """How a result becomes parts (an entry for `forms.encoded`)."""
        asked = self.into.get(out.name)
        rounding = {"rounding": asked.rounding} if asked and asked.rounding else {}
        shape = list(out.shape)
        beside = {"beside": n} if (n := len(list(self._beside(out, like)))) else {}
        entry = {"form": like.form, "parts": parts, "shape": shape, "params": like.params}
        return entry | rounding | beside

    def _dropped(self, tasks: Sequence[Task]) -> dict[str, str]:
        """Parts of matrices that are left out, by name."""
        used = {p.name for p in chain.from_iterable(t.inputs for t in tasks) if p.source == 0}
        made: dict[str, str] = {}
        for name, why in self.wanted.dropped.items():
            stored = self.sources[0].tensors.get(name)
            names = [p.name for p in stored.lying] if stored else [name]
            made |= {n: why for n in names if n not in used}
        return made

    def _config(self) -> JsonObject:
        """The config, with every form that is still there told to a loader."""
        config = self.wanted.config
        told: dict[str, JsonObject] = {}
        known: set[str] = set()
        for source in reversed(self.sources):
            told |= source.told
            known |= set(source.tensors)
        full = [t for t in self.wanted.targets if t.name not in self.chosen]
        new = [t for t in full if t.name not in known or self._namesake(t)]
        held: dict[str, dict[str, tuple[Target, JsonObject]]] = {}
        for name, like in self.chosen.items():
            held.setdefault(like.form, {})[name] = (self.targets[name], like.params)
        for name in sorted(held):
            written = Written(held[name], full, new, _kin(forms.named(name), held))
            config = forms.named(name).config(config, told.get(name, {}), written)
        return config


def _kin(form: Form, held: Mapping[str, Mapping[str, tuple[Target, JsonObject]]]) -> dict[str, Kin]:
    """The matrices of all forms that share a config with this one."""
    found: dict[str, Kin] = {}
    for name in sorted(held):
        other = forms.named(name)
        alike = {form.quant_method, other.quant_method}
        if name == form.name or (len(alike) < 2 and alike != {""}):
            found |= {n: Kin(target, other, params) for n, (target, params) in held[name].items()}
    return found


def _inputs(made: Makers) -> Iterator[Piece]:
    """All that goes into a target."""
    return chain.from_iterable(task.inputs for task, _ in made)


def _full(target: Target, made: Makers) -> InParts | None:
    """No form, whatever goes in."""
    return None


def held(stored: Stored, matrix: Tensor, form: str) -> Tensor:
    """The values that an output holds where `matrix` takes the place of a source's matrix: rounded
    to its dtype, or with `same` to what its form can hold.
    """
    from moetool.kernels import codec

    if form != "same" or stored.parts is None:
        return matrix.to(codec.torch_dtype(stored.dtype))
    kept = forms.named(stored.parts.form)
    return kept.decode(kept.encode(matrix, stored.parts.params), stored.parts.params)


def widened(sources: Sequence[Checkpoint], made: Plan, form: str) -> list[str]:
    """What `auto` must say: the matrices of a source that the output holds in full."""
    if form != "auto":
        return []
    told = set(chain.from_iterable(s.told for s in sources)) - made.stored_as
    lost = sorted(n for n in told if not forms.named(n).moves)
    again = {n: " (--form same rounds them to it again)" for n in lost if forms.named(n).alone}
    return [
        f"matrices stored as {n} are written in full, since some are computed{again.get(n, '')}"
        for n in lost
    ]
