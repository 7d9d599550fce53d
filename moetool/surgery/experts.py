"""Where the experts of a mixture lie, and everything that must be cut with them; from headers and
layout, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.counted import Counted, Finder
from moetool.surgery.layout import Layout
from moetool.surgery.spec import FLOATS, Piece, Stored
from moetool.surgery.text_model import TextModel, text_model

ALIASES = ("num_experts", "num_local_experts")


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
        finder = Finder(at, experts, zero_experts)
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
    def text(self) -> JsonObject:
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

    @property
    def coded(self) -> bool:
        """Whether an expert's matrices lie in a form other than `full`."""
        return any(c.stored.parts for c in self.counted.values() if c.kind == "expert")

    def orientation(self, layer: int) -> JsonObject:
        """How stacked matrices lie: {transposed, interleaved, hidden}; a file's own shapes decide
        where the two sides of one differ. Both stacks are asked: `gate_up` is square where twice
        the width is `hidden`, and `down` is not then.
        """
        hidden = int(self.layout.field("hidden", self.text_model.config) or 0)
        flags = self.layout.experts
        transposed = bool(
            flags.is_transposed or self.layout.overlay.gate_up.startswith("transposed")
        )
        stacks = (c for c in self.by_layer[layer] if c.kind == "expert" and c.expert is None)
        lying = {c.role: c.stored.shape[1:] for c in stacks}
        for role, side in (("down", 1), ("gate_up", 0)):  # where `hidden` is when transposed
            sides = lying.get(role, ())
            if "gate_up" in lying and len(sides) == 2 and sides[0] != sides[1]:
                transposed = sides[side] == hidden and sides[1 - side] != hidden
        return {
            "transposed": transposed,
            "interleaved": "interleaved" in self.layout.overlay.gate_up
            or flags.is_concatenated is False,
            "hidden": hidden,
        }

    def law(self) -> JsonObject:
        """The fields of kernels.moe.Law for this config. Raises MoetoolError for a family whose
        routing is not described.
        """
        rule, text = self.layout.overlay.law, self.text
        if rule.score not in ("softmax", "sigmoid", "sparsemixer", "sigmoid-on-input"):
            raise MoetoolError(
                f"the routing of {self.layout.model_type} is not one that moetool computes",
                found=rule.score or "nothing",
                expected="softmax, sigmoid, sparsemixer or sigmoid-on-input",
                hint="methods that need no text work: `moetool methods list` marks them",
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
            "near": 2 * float(text.get(rule.near, 0.0) or 0.0),
        }

    def act(self) -> JsonObject:
        """The activation: {name} and, for gpt-oss, {alpha, limit}."""
        text = self.text
        if self.layout.overlay.law.act == "clamped-swiglu":
            usual = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
            said = usual | {k: v for k, v in text.items() if k in usual and v is not None}
            alpha, limit = (float(said[name]) for name in usual)
            return {"name": "clamped-swiglu", "alpha": alpha, "limit": limit}
        return {
            "name": str(
                text.get("hidden_act")
                or text.get("hidden_activation")
                or text.get("mlp_hidden_act")
                or "silu"
            )
        }

    def fields(self, experts: int) -> JsonObject:
        """The config fields that say how many experts there are: the family's own and its known
        spellings, all with one value.
        """
        own = self.layout.fields["experts"]
        return {own: experts} | {
            alias: experts
            for alias, real in self.layout.aliases.items()
            if real == own and alias in ALIASES
        }

    def config_with(self, changed: JsonObject) -> JsonObject:
        """The checkpoint's whole config with fields of its text part changed."""
        path = self.text_model.path
        whole_config: JsonObject = {**self.source.config}
        inner = whole_config
        for part in path:
            inner[part] = {**inner.get(part, {})}
            inner = inner[part]
        inner.update(changed)
        return whole_config

    def expert_bytes(self) -> int:
        """Bytes of all routed experts; what several share counts once."""
        lying: dict[str, int] = {}
        for counted in self.counted.values():
            if counted.kind == "expert":
                lying |= {part.name: part.size for part in counted.stored.lying}
        return sum(lying.values())

    def expert_elements(self, layer: int) -> int:
        """Elements of one expert of a layer."""
        return sum(p.count for p in self.pieces(layer, 0).values())

    def width(self, layer: int) -> int:
        """Neurons of an expert of a layer: what its down_proj sees, whichever way it lies."""
        hidden = int(self.layout.field("hidden", self.text_model.config) or 1)
        return self.pieces(layer, 0)["down"].count // hidden


_ROLES = {"gate", "up", "down", "gate_up", "gate_up_bias", "down_bias"}


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
