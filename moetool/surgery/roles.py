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

from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.plain_experts import PlainExperts
from moetool.surgery.spec import FLOATS, Piece, Stored, whole
from moetool.surgery.text_model import TextModel, text_model

ROLES = ("experts", "shared", "dense", "attn", "lm_head", "embed")
_BY_SLOT = {"ffn": "dense", "shared": "shared"}
_NONE = ("router", "shared.switch")


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
            role = _role(at, stored)
            if role in ROLES:
                layer = _layer(at, name)
                found.append(Matrix(name, role, whole(stored), stored.dtype, layer))
            elif role:
                without[name] = role
        return cls(tuple(found), without)


def _layer(at: TextModel, name: str) -> int | None:
    matched = at.match(name)
    return matched.layer if matched else None


def _role(at: TextModel, stored: Stored) -> str:
    """A role; else why a matrix has none, in words; empty for what is no matrix."""
    if len(stored.shape) != 2 or stored.dtype not in FLOATS or min(stored.shape) < 2:
        return ""
    matched = at.match(stored.name)
    if matched is None or not at.layout.in_text(matched.slot):
        return "it is outside the text model"
    layout, slot = at.layout, matched.slot
    if slot.name in layout.tied:
        return "lm_head"
    if slot.name in layout.tied.values():
        return "embed"
    if slot.role in _NONE or str(slot.role).startswith("router"):
        return "routers are never quantized"
    if slot.layers is None or not slot.name.endswith(".weight"):
        return "it is no linear of a layer"
    count = at.field("layers")
    if matched.layer is not None and count and matched.layer >= count:
        return "it is of a layer that predicts further tokens (MTP)"
    return _BY_SLOT.get(str(slot.role).partition(".")[0], "attn")


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
