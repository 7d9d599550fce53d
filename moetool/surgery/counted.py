"""Which tensors count experts, told by their names and shapes.

A tensor counts experts when its name holds an expert number, when a whole axis of it is the number
of experts (stacked experts, router rows, selection biases, per-expert scales), or when its values
are expert ids. Layers that a family keeps for predicting more tokens (MTP) are numbered on from
the last one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from moetool.errors import MoetoolError
from moetool.surgery import calibrated
from moetool.surgery.family import Slot
from moetool.surgery.layout import words
from moetool.surgery.spec import Piece, Stored, rows, whole
from moetool.surgery.text_model import TextModel

_SIDE = {"router", "router.bias", "router.scale"}


@dataclass(frozen=True)
class Counted:
    """A tensor that counts experts. `expert`: its number, for one expert's own tensor; None when
    it holds a slab for each (`rows` rows of the flattened first axes a slab). `kind`: expert |
    router | ids.
    """

    stored: Stored
    layer: int
    role: str
    kind: str
    expert: int | None = None
    rows: int = 1
    flat: bool = False  # the experts lie along the last axis of a [1, experts] tensor
    tail: int = 0  # characters behind the expert's number in the name

    def named(self, expert: int) -> str:
        """One expert's own tensor under another number; a stack keeps its name."""
        name = self.stored.name
        if self.expert is None:
            return name
        return (
            name[: len(name) - self.tail - len(str(self.expert))]
            + str(expert)
            + name[len(name) - self.tail :]
        )

    def slab(self, expert: int) -> Piece:
        """This tensor's part for one expert."""
        if self.expert is not None:
            return whole(self.stored)
        if self.flat:
            return Piece(self.stored.name, (1,), expert)
        piece = rows(self.stored, expert * self.rows, (expert + 1) * self.rows)
        return (
            Piece(piece.name, self.stored.shape[1:], piece.offset)
            if self.rows == 1 and (self.kind == "expert" or len(self.stored.shape) > 2)
            else piece
        )

    def shape(self, experts: int) -> tuple[int, ...]:
        """Its shape with another number of experts."""
        shape = self.stored.shape
        return (*shape[:-1], experts) if self.flat else (experts * self.rows, *shape[1:])


class Finder:
    """Says of a tensor how it counts experts; built once for a checkpoint."""

    def __init__(self, at: TextModel, experts: int, zero_experts: int) -> None:
        self._at, self._experts, self._zero_experts = at, experts, zero_experts
        self._layers = int(at.layout.field("layers", at.config) or 0)
        self._field = at.layout.fields["experts"]
        router = at.layout.role("router")
        self._router = router.name.rpartition(".")[0] + "." if router else ""
        templates = dict(at.layout.fused())
        own = {
            s.name: str(s.role).removeprefix("expert.")
            for s in at.layout.tensors
            if str(s.role).startswith("expert.")
        }
        self._stacked = [
            (_pattern(t), r)
            for t, r in (
                {n: r for n, r in own.items() if "{expert}" not in n}
                | {t: r for r, t in templates.items()}
            ).items()
        ]
        self._single = [(_pattern(n), r) for n, r in own.items() if "{expert}" in n]
        heads = {n.partition("{expert}")[0] + "{expert}." for n in own if "{expert}" in n}
        self._heads = [_pattern(h) for h in sorted(heads)]

    def find(self, stored: Stored) -> Counted | None:
        name, shift = self._normal(stored.name)
        if name is None:
            return None
        for pattern, role in self._single:
            if hit := pattern.fullmatch(name):
                return Counted(
                    stored,
                    int(hit["layer"]) + shift,
                    role,
                    "expert",
                    int(hit["expert"]),
                    tail=len(name) - hit.end("expert"),
                )
        for pattern in self._heads:
            if hit := pattern.match(
                name
            ):  # a suffix the layout does not have: scales of a quantizer, biases
                return Counted(
                    stored,
                    int(hit["layer"]) + shift,
                    name[hit.end() :],
                    "expert",
                    int(hit["expert"]),
                    tail=len(name) - hit.end("expert"),
                )
        for pattern, role in self._stacked:
            hit = pattern.match(name)
            if hit and (hit.end() == len(name) or name[hit.end()] in "._"):
                return self._slabs(
                    stored, int(hit["layer"]) + shift, role + name[hit.end() :], "expert"
                )
        found = self._at.layout.match(name)
        if (
            found is None
            or found.layer is None
            or found.slot.role == calibrated.ROLE  # nobody cuts one: reduce/decide.py
            or found.slot.role in ("shared.gate", "shared.up", "shared.down")
        ):
            return None
        return self._side(stored, found.slot, found.layer + shift)

    def _normal(self, name: str) -> tuple[str | None, int]:
        """The name as the layout has it, and what to add to its layer number (MTP layers lie
        beyond the last).
        """
        if self._at.prefix:
            return self._at.inner(name), 0
        rest = words().in_mtp(name)
        return (self._at.layout.stem + rest, self._layers) if rest else (name, 0)

    def _side(self, stored: Stored, slot: Slot, layer: int) -> Counted | None:
        shape, total = slot.shape or [], self._experts + self._zero_experts
        if slot.role == "router.ids":
            return Counted(stored, layer, "ids", "ids")
        counts = [
            i
            for i, formula in enumerate(shape)
            if formula and self._field in re.split(r"[*+]", formula)
        ]
        beside = (
            self._router
            and slot.shape is None
            and slot.name.startswith(self._router)
            and total in (stored.shape or (0,))
        )
        if not counts and (slot.role in _SIDE or beside):
            counts = [next((i for i, n in enumerate(stored.shape) if n == total), 0)]
        if not counts:
            return None
        axis, role = counts[0], slot.role or slot.name.rpartition(".")[2]
        if axis and prod(stored.shape[:axis]) != 1:
            raise MoetoolError(
                "experts lie along an inner axis",
                tensor=stored.name,
                expected="the first axis",
                found=list(stored.shape),
                hint=f"{self._at.layout.model_type} cannot be cut yet; please report it",
            )
        if axis:
            return Counted(stored, layer, role, "router", flat=True)
        return self._slabs(stored, layer, role, "router")

    def _slabs(self, stored: Stored, layer: int, role: str, kind: str) -> Counted:
        count = stored.shape[0] if stored.shape else 0
        if (
            kind == "expert"
            and len(stored.shape) == 2
            and role in ("gate", "up", "down")
            and count % self._experts == 0
            and count > self._experts
        ):
            return Counted(stored, layer, role, kind, rows=count // self._experts)
        return Counted(stored, layer, role, kind)


def _pattern(template: str) -> re.Pattern[str]:
    text = (
        re.escape(template)
        .replace(r"\{layer\}", r"(?P<layer>\d+)")
        .replace(r"\{expert\}", r"(?P<expert>\d+)")
    )
    return re.compile(text)
