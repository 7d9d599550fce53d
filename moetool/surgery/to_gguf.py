"""From outputs by a family's names to those of a GGUF file: every matrix to its place there, turned
where llama.cpp has it otherwise, experts to stacks; the rest in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.kernels import turn
from moetool.surgery import forms, groups, ragged
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.containers import gguf
from moetool.surgery.forms.gguf import PLAIN
from moetool.surgery.gguf import families, fields, tokenizer
from moetool.surgery.gguf.families import SAME, Dialect, Place
from moetool.surgery.layout import is_dead
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.reform import Into
from moetool.surgery.spec import Piece, Target, Task, rows, whole
from moetool.surgery.text_model import TextModel, text_model

FACTORS = "rope_freqs.weight"
MTP = "llama.cpp is not given layers that predict further tokens"
TIED = "it is tied to the input embedding"
DEAD = "no class reads it"
_STEP = 1 << 24  # weights that a task works on, where a matrix can be cut into rows


@dataclass(frozen=True)
class Arranged:
    """Outputs of a GGUF file, the form of each of its matrices, and what has to be said."""

    wanted: Outputs
    into: dict[str, Into]
    warnings: tuple[str, ...] = ()


def arranged(
    sources: Sequence[Checkpoint],
    wanted: Outputs,
    into: Mapping[str, Into],
    matrices: Collection[str],
) -> Arranged:
    """`wanted` and `into` by the family's names, each target made by one copy; `matrices`: those
    that may stay in 16 bits, all other tensors become float32. Raises MoetoolError for a family or
    a tensor that llama.cpp does not know.
    """
    return _Arranging(sources, wanted, into, matrices).made()


def forms_in(plan: Plan, into: Mapping[str, Into]) -> dict[str, Into]:
    """The forms in which a reader of a planned output finds its matrices: those of a GGUF file have
    a form of its own, else as they were asked for.
    """
    if not plan.container:
        return dict(into)
    found: dict[str, Into] = {}
    tensors = plan.seen().tensors
    for name, asked in into.items():
        parts = tensors[name].parts if name in tensors else None
        if parts is not None:
            found[name] = Into(parts.form, parts.params, asked.rounding)
    return found


@dataclass
class _Arranging:
    sources: Sequence[Checkpoint]
    wanted: Outputs
    into: Mapping[str, Into]
    matrices: Collection[str]
    at: TextModel = field(init=False)
    family: Dialect = field(init=False)

    def __post_init__(self) -> None:
        self.at = text_model(self.wanted.config)
        _refuse_ragged(self.wanted.config)
        self.family = families.family(self.at, str(self.wanted.config.get("model_type")))
        self.targets: dict[str, Target] = {}
        self.tasks: list[Task] = []
        self.forms: dict[str, Into] = {}
        self.dropped: dict[str, str] = {}
        self.halved: list[str] = []
        self.anew: dict[str, None] = {}

    def made(self) -> Arranged:
        copies = {task.outputs[0].name: task.inputs[0] for task in self.wanted.tasks}
        for target in self.wanted.targets:
            why = self._without(target.name)
            if why:
                self.dropped[target.name] = why
                continue
            for place in self._places(target.name):
                self._put(target, copies[target.name], place)
        self._factors()
        types = {name: str(asked.params["kind"]) for name, asked in self.forms.items()}
        said = tokenizer.read(
            self.sources[0].folder, int(self.at.text["vocab_size"]), self.wanted.config
        )
        container = self._container(types, said.fields)
        dropped = {**self.wanted.dropped, **self.dropped}
        config = {k: v for k, v in self.wanted.config.items() if k != "quantization_config"}
        made = Outputs(config, list(self.targets.values()), self.tasks, dropped, container)
        return Arranged(made, self.forms, (*said.warnings, *self._warnings()))

    def _without(self, name: str) -> str:
        """Why a tensor has no place; empty where it has one."""
        if is_dead(name):
            return DEAD
        tied = self.at.text.get(
            "tie_word_embeddings", self.wanted.config.get("tie_word_embeddings")
        )
        if tied and name in self.at.layout.tied:
            return TIED
        matched, count = self.at.match(name), self.at.field("layers")
        if matched and matched.layer is not None and count and matched.layer >= count:
            return MTP
        return ""

    def _places(self, name: str) -> tuple[Place, ...]:
        matched = self.at.match(name)
        places = self.family.places(self.at, matched) if matched else ()
        if not places:
            raise MoetoolError(
                f"llama.cpp's {self.family.arch} has no place for a tensor of this model",
                file=self.sources[0].folder,
                tensor=name,
                hint="choose another format: llama.cpp would refuse the file, or answer otherwise",
            )
        return places

    def _put(self, target: Target, piece: Piece, place: Place) -> None:
        """One tensor, or an expert's slab of one."""
        word = place.turn[0]
        if word in ("keys", "values") and piece.source:  # solved for a matrix that is cut anew
            piece = whole(self.sources[0].tensor(target.name))
            self.anew.setdefault(target.name, None)
        shape = turn.shape_of(target.shape, place.turn)
        asked = self._form(target.name, place.name, shape)
        dtype = target.dtype if target.name in self.matrices else "F32"
        if asked is not None and asked.params["kind"] in PLAIN:
            dtype, asked = PLAIN[asked.params["kind"]], None
        elif asked is not None:
            self.forms[place.name] = asked
        offset = 0
        if place.expert is None:
            self.targets[place.name] = Target(place.name, dtype, shape)
        else:
            count = int(self.at.field("experts") or 0)
            self.targets.setdefault(place.name, Target(place.name, dtype, (count, *shape)))
            offset = place.expert * prod(shape)
        for source, out in self._cut(piece, Piece(place.name, shape, offset), place.turn):
            self.tasks.append(self._task(source, out, place.turn, dtype, asked is not None))

    def _form(self, name: str, place: str, shape: Sequence[int]) -> Into | None:
        """The form of a target; f16 where its blocks do not fit what llama.cpp makes of it."""
        asked = self.into.get(name)
        if asked is None:
            return None
        target = Target(place, "F32", tuple(shape))
        if forms.named(asked.form).misfit(target, asked.params):
            self.halved.append(place)
            return Into(asked.form, {"kind": "f16"})
        return asked

    def _cut(
        self, piece: Piece, out: Piece, how: Sequence[object]
    ) -> Iterator[tuple[Piece, Piece]]:
        """A stack by experts, a large matrix by rows: less is held at once."""
        stacked = len(piece.shape) == 3 and len(out.shape) == 3
        plain = tuple(how) == SAME and not self._held(piece) and len(piece.shape) == 2
        if stacked and how[0] not in ("keys", "values"):
            for number in range(piece.shape[0]):
                yield _slab(piece, number), _slab(out, number)
        elif plain and piece.count > _STEP:
            step = max(1, _STEP // piece.shape[1])
            for first in range(0, piece.shape[0], step):
                last = min(first + step, piece.shape[0])
                yield rows(piece, first, last, piece.source), rows(out, first, last)
        else:
            yield piece, out

    def _held(self, piece: Piece) -> bool:
        return self.sources[piece.source].tensor(piece.name).parts is not None

    def _task(
        self, piece: Piece, out: Piece, how: Sequence[object], dtype: str, formed: bool
    ) -> Task:
        """A copy where bytes stay as they are, or reform finds out whether they can."""
        if tuple(how) != SAME:
            return Task("turn", (piece,), (out,), {"turn": list(how)})
        stored = self.sources[piece.source].tensor(piece.name)
        moved = formed or stored.parts is not None or stored.dtype == dtype
        return Task("copy" if moved else "reform", (piece,), (out,))

    def _factors(self) -> None:
        """The tensor of llama3's stretched positions."""
        values = fields.rope_factors(self.at)
        if values:
            target = Target(FACTORS, "F32", (len(values),))
            self.targets[FACTORS] = target
            self.tasks.append(Task("listed", (), (whole(target),), {"values": values}))

    def _container(
        self, types: Mapping[str, str], said: Sequence[tuple[object, ...]]
    ) -> JsonObject:
        kinds = {n: t for n, t in self.targets.items() if len(t.shape) > 1}  # norms count little
        number = gguf.file_type(types, {n: (t.dtype, prod(t.shape)) for n, t in kinds.items()})
        name = str(self.wanted.config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]
        told = [*fields.fields(self.at, self.family, name, number), *said]
        return {"name": "gguf", "types": dict(types), "fields": [list(f) for f in told]}

    def _warnings(self) -> Iterator[str]:
        yield from families.warnings(self.family, self.at.text)
        if self.anew:
            yield (
                f"{len(self.anew)} matrices are cut in two for llama.cpp, which what was solved for "
                f"them does not fit: they are rounded as rtn does ({next(iter(self.anew))}, ...)"
            )
        if self.halved:
            yield (
                f"{len(self.halved)} tensors are written in f16, whose rows are no whole number of "
                f"blocks: {', '.join(self.halved[:3])}"
            )


def _refuse_ragged(config: JsonObject) -> None:
    """MoetoolError where layers have numbers of experts of their own: a GGUF file has one."""
    if groups.is_ragged(config):
        raise MoetoolError(
            "a GGUF file has one number of experts for all layers, and these hold different ones",
            field=ragged.KEY,
            expected="layers that are alike",
            hint="cut the model it was made from with --uneven ghost or zeroed, or alike "
            "(--budget uniform)",
        )


def _slab(piece: Piece, number: int) -> Piece:
    size = prod(piece.shape[1:])
    return Piece(piece.name, piece.shape[1:], piece.offset + number * size, piece.source)
