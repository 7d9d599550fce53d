"""Which matrices of a checkpoint can be quantized, and what each is for: headers and layout alone.

experts  routed experts, each by itself where the family reads them so
shared   experts that are always on
dense    FFNs of layers without experts
attn     every other linear of a layer: attention, and what stands in its place
lm_head  the output embedding, where it is no copy of the input's
embed    the input embedding

Routers, selection biases, switches of shared experts and norms decide or scale; they have no role.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moetool.archs.templates import Template, role_of
from moetool.data import JsonObject
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.family import MAY, Slot
from moetool.surgery.layout import words
from moetool.surgery.plain_experts import PlainExperts
from moetool.surgery.spec import FLOATS, Piece, Stored, whole
from moetool.surgery.text_model import TextModel, text_model

ROLES = ("experts", "shared", "dense", "attn", "lm_head", "embed")
_BY_SLOT = {"ffn": "dense", "shared": "shared"}
_NONE = ("router", "shared.switch")
MTP = "it is of a layer that predicts further tokens (MTP)"
NO_LINEAR = "it is no linear of a layer"
TIED = "it is tied to the input embedding"


@dataclass(frozen=True)
class Matrix:
    """One matrix under the name that it has in an output: where it lies, and what it is for."""

    name: str
    role: str
    piece: Piece
    dtype: str
    layer: int | None = None
    expert: int | None = None
    part: str = ""  # gate, up, down of experts

    @property
    def shape(self) -> tuple[int, ...]:
        return self.piece.shape


@dataclass(frozen=True)
class Roles:
    """All matrices with a role, in file order, and the others by name with the reason."""

    matrices: tuple[Matrix, ...]
    without: dict[str, str]

    @classmethod
    def of(cls, source: Checkpoint) -> Roles:
        """Look through a checkpoint. Raises MoetoolError for a family there is no layout for."""
        at = text_model(source.config)
        mixture = Mixture.of(source) if at.layout.kind == "moe" else None
        found: list[Matrix] = []
        experts = {} if mixture is None else _experts(mixture)
        without: dict[str, str] = {}
        for name, stored in source.tensors.items():
            if name in experts:
                found += experts[name]
                continue
            role = _role(at, stored, source.config)
            if role in ROLES:
                layer = at.layer_of(name)
                found.append(Matrix(name, role, whole(stored), stored.dtype, layer))
            elif role:
                without[name] = role
        return cls(tuple(found), without)


def _role(at: TextModel, stored: Stored, config: JsonObject) -> str:
    """A role; else why a matrix has none, in words; empty for what is no matrix."""
    if len(stored.shape) < 2 or stored.dtype not in FLOATS:
        return ""
    matched = at.match(stored.name)
    if matched is None and at.layer_of(stored.name) is not None:
        return _of_unknown(stored)
    if matched is None or not at.layout.in_text(matched.slot):
        return MTP if words().in_mtp(stored.name) else "it is outside the text model"
    layout, slot = at.layout, matched.slot
    if slot.name in layout.tied and not words().is_first(slot.name):
        return TIED if _is_tied(at, config) else "lm_head"
    if slot.name in {*layout.tied, *layout.tied.values()}:
        return "embed"
    if slot.role in _NONE or str(slot.role).startswith("router"):
        return "routers are never quantized"
    if _is_no_linear(slot, stored):
        return NO_LINEAR
    if layout.overlay.linears == "transposed":
        return "its family stores linears as [in, out], which no quantized form is read as"
    count = at.field("layers")
    if matched.layer is not None and count and matched.layer >= count:
        return MTP
    return _BY_SLOT.get(str(slot.role).partition(".")[0], "attn")


def _of_unknown(stored: Stored) -> str:
    """The role of a matrix in a layer that the family's data does not name: layers are of kinds
    that not every config has.
    """
    if len(stored.shape) != 2 or not stored.name.endswith(".weight"):
        return NO_LINEAR
    found = role_of(Template.of(stored.name).name) or ""
    head = found.partition(".")[0]
    if head in ("expert", "router") or found in _NONE:
        return "its family knows no such tensor"
    return _BY_SLOT.get(head, "attn")


def _is_tied(at: TextModel, config: JsonObject) -> bool:
    """Whether the output embedding is the input's, and a tensor of its own is read by nobody."""
    return bool(at.text.get("tie_word_embeddings", config.get("tie_word_embeddings")))


def _is_no_linear(slot: Slot, stored: Stored) -> bool:
    """Convolutions, tables, vectors written as rows, parameters that are no module's weight."""
    outside = slot.layers in (None, MAY) or not slot.name.endswith(".weight")
    return outside or len(stored.shape) != 2 or min(stored.shape) < 2 or words().is_table(slot.name)


def _experts(mixture: Mixture) -> dict[str, list[Matrix]]:
    """Stored tensor of experts -> the matrices that begin in it."""
    single = all(c.expert is not None for c in mixture.counted.values() if c.kind == "expert")
    names = mixture.layout.per_expert() if mixture.layout.experts.reads_per_expert else {}
    found: dict[str, list[Matrix]] = {}
    if single or not (names and mixture.layout.fused()):
        for matrix in _as_they_lie(mixture):
            found.setdefault(matrix.piece.name, []).append(matrix)
        return found
    plain = PlainExperts.of(mixture.source)
    for layer in plain.layers:
        for expert in range(mixture.count_in(layer)):
            for part, piece in plain.pieces(layer, expert).items():
                name = plain.named(names[part], layer, expert)
                made = Matrix(name, "experts", piece, plain.dtype(layer), layer, expert, part)
                found.setdefault(piece.name, []).append(made)
    return found


def _as_they_lie(mixture: Mixture) -> Iterator[Matrix]:
    """Single tensors, and stacks that have no other layout."""
    for counted in mixture.counted.values():
        stored, biases = counted.stored, counted.role.endswith("bias")
        if (
            counted.kind != "expert"
            or biases
            or len(stored.shape) < 2
            or stored.dtype not in FLOATS
        ):
            continue
        if counted.layer in mixture.mtp_layers:
            continue
        yield Matrix(
            stored.name,
            "experts",
            whole(stored),
            stored.dtype,
            counted.layer,
            counted.expert,
            counted.role,
        )
