"""Where the experts of a mixture lie, and everything that must be cut with them; from headers and
layout, without torch.

A tensor counts experts when its name holds an expert number, when a whole axis of it is the number
of experts (stacked experts, router rows, selection biases, per-expert scales), or when its values
are expert ids. Layers that a family keeps for predicting more tokens (MTP) are numbered on from
the last one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.family import Slot
from moetool.surgery.layout import Layout, TextModel, text_model, words
from moetool.surgery.spec import FLOATS, Piece, Stored, rows, whole

ALIASES = ("num_experts", "num_local_experts")
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


@dataclass(frozen=True)
class Mixture:
    """The experts of a checkpoint. Made by `Mixture.of`; `layers` are those that hold experts, MTP
    layers last (`mtp_layers`).
    """

    source: Checkpoint
    text_model: TextModel
    experts: int
    zero_experts: (
        int  # router rows beyond the experts that name no tensors (LongCat's zero experts)
    )
    layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    counted: dict[str, Counted] = field(repr=False)

    @classmethod
    def of(cls, source: Checkpoint) -> Mixture:
        """Find them by name and shape; MoetoolError when the family has none, or a tensor of an
        expert fits no rule.
        """
        at = text_model(source.config)
        layout = at.layout
        if layout.kind != "moe":
            raise MoetoolError(
                f"{layout.model_type} has no experts",
                file=source.folder,
                expected="a mixture of experts",
                hint="`moetool archs list` shows the families with experts",
            )
        experts = layout.field("experts", at.config)
        if not isinstance(experts, int) or experts < 1:
            raise MoetoolError(
                "the config does not say how many experts there are",
                file=f"{source.folder}/config.json",
                expected=layout.fields.get("experts", "a count"),
                found=experts,
                hint="restore the config from the original model",
            )
        zero_experts = int(layout.text(at.config).get(layout.overlay.law.zero, 0) or 0)
        finder = _Finder(at, experts, zero_experts)
        counted = {
            name: found
            for name, stored in source.tensors.items()
            if (found := finder.find(stored)) is not None
        }
        numbers = sorted({c.layer for c in counted.values() if c.kind == "expert"})
        count = int(layout.field("layers", at.config) or 0)
        if not any(n < count for n in numbers):
            raise MoetoolError(
                "no experts found where the layout has them",
                file=source.folder,
                expected=f"experts of {layout.model_type}",
                hint="`moetool inspect` says what is there",
            )
        return cls(
            source,
            at,
            experts,
            zero_experts,
            tuple(n for n in numbers if n < count),
            tuple(n for n in numbers if n >= count),
            counted,
        )

    @property
    def layout(self) -> Layout:
        return self.text_model.layout

    @cached_property
    def text(self) -> dict[str, Any]:
        """The text part of the config, defaults filled in."""
        return self.layout.text(self.text_model.config)

    @property
    def top_k(self) -> int:
        return int(self.layout.field("top_k", self.text_model.config) or 1)

    @property
    def groups(self) -> int:
        """Groups of a group-limited router, else 1."""
        rule = self.layout.overlay.law.groups
        if not rule or (rule == "max" and self.text.get("topk_method") == "greedy"):
            return 1
        return int(self.layout.field("groups", self.text_model.config) or 1)

    @cached_property
    def by_layer(self) -> dict[int, list[Counted]]:
        """Counted tensors of each layer, in name order."""
        found: dict[int, list[Counted]] = {}
        for name in sorted(self.counted):
            found.setdefault(self.counted[name].layer, []).append(self.counted[name])
        return found

    def pieces(self, layer: int, expert: int) -> dict[str, Piece]:
        """role -> piece of one expert (`gate`, `up`, `down` or `gate_up`, `down`, and biases), as
        they lie in the files.
        """
        return {
            c.role: c.slab(expert)
            for c in self._index[layer].get(expert, []) + self._index[layer].get(None, [])
        }

    @cached_property
    def _index(self) -> dict[int, dict[int | None, list[Counted]]]:
        index: dict[int, dict[int | None, list[Counted]]] = {}
        for c in self.counted.values():
            if c.kind == "expert":
                index.setdefault(c.layer, {}).setdefault(c.expert, []).append(c)
        return index

    def count_in(self, layer: int) -> int:
        """Experts that this layer holds (a ragged checkpoint has its own number in each)."""
        router = self.side(layer, "router")
        return (
            (router.stored.shape[-1] if router.flat else router.stored.shape[0] // router.rows)
            - self.zero_experts
            if router
            else self.experts
        )

    def side(self, layer: int, role: str) -> Counted | None:
        """The layer's tensor of this role (`router`, `router.bias`), if it has one."""
        return next((c for c in self.by_layer.get(layer, []) if c.role == role), None)

    def shared(self, layer: int) -> dict[str, Stored]:
        """gate, up, down (and switch) of the always-on expert, where the family has one."""
        found = {}
        for role in ("gate", "up", "down", "switch"):
            slot = self.layout.role(f"shared.{role}")
            stored = (
                self.source.tensors.get(
                    self.text_model.prefix + slot.name.replace("{layer}", str(layer))
                )
                if slot
                else None
            )
            if stored is not None and stored.shape[-1] and stored.shape[0]:
                found[role] = stored
        return found

    @property
    def plain(self) -> bool:
        """Whether every expert is stored in floating point under names that the family's layout
        has (so it can be computed with).
        """
        return all(
            c.stored.dtype in FLOATS and c.role in _ROLES
            for c in self.counted.values()
            if c.kind == "expert"
        ) and not self.source.config.get("quantization_config")

    def orientation(self, layer: int) -> dict[str, Any]:
        """How stacked matrices lie: {transposed, interleaved, hidden}; a file's own shape decides
        where the two sides differ.
        """
        hidden = int(self.layout.field("hidden", self.text_model.config) or 0)
        flags = self.layout.experts
        transposed = bool(
            flags.is_transposed or self.layout.overlay.gate_up.startswith("transposed")
        )
        shape = next(
            (
                c.stored.shape
                for c in self.by_layer[layer]
                if c.role == "gate_up" and c.expert is None
            ),
            None,
        )
        if shape is not None and len(shape) == 3 and shape[1] != shape[2]:
            transposed = shape[1] == hidden and shape[2] != hidden
        return {
            "transposed": transposed,
            "interleaved": "interleaved" in self.layout.overlay.gate_up
            or flags.is_concatenated is False,
            "hidden": hidden,
        }

    def law(self) -> dict[str, Any]:
        """The fields of kernels.moe.Law for this config. Raises MoetoolError for a family whose
        routing is not described.
        """
        rule, text = self.layout.overlay.law, self.text
        if rule.score not in ("softmax", "sigmoid", "sparsemixer", "sigmoid-on-input"):
            raise MoetoolError(
                f"the routing of {self.layout.model_type} is not one that moetool computes",
                found=rule.score or "nothing",
                expected="softmax, sigmoid, sparsemixer or sigmoid-on-input",
                hint="methods that need no text work: --method router-distance or random",
            )
        renorm = rule.renorm == "always" or (
            rule.renorm == "field" and bool(text.get(self.layout.fields.get("renorm", "")))
        )
        grouped = self.groups > 1
        scale = text.get(self.layout.fields.get("routed_scale", ""), 1.0)
        return {
            "top_k": self.top_k,
            "score": rule.score,
            "renorm": renorm,
            "scale": float(scale or 1.0),
            "bias": rule.bias,
            "groups": self.groups,
            "group_top": int(text.get("topk_group") or 1) if grouped else 1,
            "group_rule": "max" if rule.groups == "max" else "sum2",
            "group_fill": 0.0 if rule.groups in ("max", "zero") else float("-inf"),
            "least_sum": float(text.get(rule.least_sum, 0.0) or 0.0),
        }

    def act(self) -> dict[str, Any]:
        """The activation: {name} and, for gpt-oss, {alpha, limit}."""
        text = self.text
        if self.layout.overlay.law.act == "clamped-swiglu":
            return {
                "name": "clamped-swiglu",
                "alpha": float(text.get("swiglu_alpha", 1.702)),
                "limit": float(text.get("swiglu_limit", 7.0)),
            }
        return {
            "name": str(
                text.get("hidden_act")
                or text.get("hidden_activation")
                or text.get("mlp_hidden_act")
                or "silu"
            )
        }

    def fields(self, experts: int) -> dict[str, Any]:
        """The config fields that say how many experts there are: the family's own and its known
        spellings, all with one value.
        """
        own = self.layout.fields["experts"]
        return {own: experts} | {
            alias: experts
            for alias, real in self.layout.aliases.items()
            if real == own and alias in ALIASES
        }

    def config_with(self, changed: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint's whole config with fields of its text part changed."""
        path = self.text_model.path
        whole_config: dict[str, Any] = {**self.source.config}
        inner = whole_config
        for part in path:
            inner[part] = {**inner.get(part, {})}
            inner = inner[part]
        inner.update(changed)
        return whole_config

    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(c.stored.size for c in self.counted.values() if c.kind == "expert")

    def expert_elements(self, layer: int) -> int:
        """Elements of one expert of a layer."""
        return sum(p.count for p in self.pieces(layer, 0).values())


_ROLES = {"gate", "up", "down", "gate_up", "gate_up_bias", "down_bias"}


class _Finder:
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


def strays(mixture: Mixture) -> Iterator[str]:
    """Names that speak of experts but fit no rule: they cannot be cut, so they must not be lost in
    silence.
    """
    for name, stored in mixture.source.tensors.items():
        if (
            name in mixture.counted
            or mixture.layout.match(name.removeprefix(mixture.text_model.prefix)) is not None
        ):
            continue
        if re.search(r"\bexperts?\b|\bexperts\.", name) and mixture.experts in stored.shape[:1]:
            yield name
