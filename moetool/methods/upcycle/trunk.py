"""Everything that is not an expert: attention, norms, embeddings, and the FFNs of layers that stay
dense.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Builder
from moetool.methods.upcycle.experts import MATRICES, Ffn
from moetool.methods.upcycle.targets import Conversion
from moetool.surgery import pair as pairing
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import words
from moetool.surgery.spec import Piece, rows, whole

Place = int | str  # a layer number, "before" or "after" the layers


@dataclass(frozen=True)
class Trunk:
    """The trunk of all sources, sorted by where its tensors lie; `weights` None means the base's
    own bytes.
    """

    sources: Sequence[Checkpoint]
    chosen: Conversion
    weights: list[float] | None
    names: dict[Place, list[str]]
    dropped: dict[str, str]

    @classmethod
    def of(
        cls, sources: Sequence[Checkpoint], chosen: Conversion, weights: list[float] | None
    ) -> Trunk:
        """Sort the base's tensors; MoetoolError for one that the family does not know or a layer
        that is not there.
        """
        base, dropped = sources[0], _left_out(sources[0], chosen)
        count = chosen.source.field("layers", chosen.config)
        names: dict[Place, list[str]] = defaultdict(list)
        for name in sorted(base.tensors):
            if name in dropped or is_ffn(chosen, name):
                continue
            found = chosen.match(name)
            if found is None or found.layer is None:
                names["before" if words().is_first(name) else "after"].append(name)
                continue
            if found.layer >= count:
                raise MoetoolError(
                    "a tensor belongs to a layer that the config does not have",
                    file=base.folder,
                    tensor=name,
                    expected=f"layers 0 to {count - 1}",
                    found=f"layer {found.layer}",
                    hint="correct num_hidden_layers, or the weights are not this config's",
                )
            names[found.layer].append(name)
        return cls(sources, chosen, weights, names, dropped)

    def write(self, build: Builder, place: Place) -> None:
        """Plan the trunk tensors of one place."""
        chosen, base = self.chosen, self.sources[0]
        text = chosen.source.text(chosen.config)
        for name in self.names.get(place, ()):
            stored = base.tensors[name]
            if chosen.outer is not None and not name.startswith(chosen.prefix):
                self._one(
                    build, whole(stored), whole(build.target(name, stored.dtype, stored.shape))
                )
                continue
            inner = name.removeprefix(chosen.prefix)
            _check_shape(base, chosen, name, inner)
            for new, span, op, params in pairing.map_tensor(
                chosen.pair, chosen.source, chosen.target, inner, text
            ):
                if (
                    new != inner
                    and chosen.prefix + new in base.tensors
                    and chosen.prefix + new not in self.dropped
                ):
                    # an untied head of its own stands in the file, and is mapped when its turn
                    # comes
                    continue
                piece = rows(stored, *span) if span else whole(stored)
                target = build.target(chosen.prefix + new, stored.dtype, piece.shape)
                self._one(build, piece, whole(target), op, params)

        if isinstance(place, int):
            self._write_zeros(build, place, text)

    def _write_zeros(self, build: Builder, layer: int, text: JsonObject) -> None:
        """Plan what the target has in a layer and the source has not."""
        chosen = self.chosen
        for slot, shape in pairing.zeros(chosen.pair, chosen.target, text):
            dtype = Ffn.read(self.sources[0], chosen, layer).dtype
            build.zeros(build.target(chosen.prefix + slot.named(layer=layer), dtype, shape))

    def write_ffn(self, build: Builder, layer: int) -> None:
        """Plan the FFN of a layer that stays dense."""
        ffn = Ffn.read(self.sources[0], self.chosen, layer)
        for matrix in MATRICES:
            slot = self.chosen.target.role(f"ffn.{matrix}")
            if slot is None:
                raise MoetoolError(
                    f"{self.chosen.target.model_type} has no dense FFN",
                    expected="experts in every layer",
                    hint="use --layers all",
                )
            piece: Piece = getattr(ffn, matrix)
            target = build.target(
                self.chosen.prefix + slot.name.replace("{layer}", str(layer)),
                ffn.dtype,
                piece.shape,
            )
            self._one(build, piece, whole(target))

    def _one(
        self,
        build: Builder,
        piece: Piece,
        out: Piece,
        op: str = "copy",
        params: JsonObject | None = None,
    ) -> None:
        if op != "copy":
            if self.weights is not None:
                raise UsageError(
                    "a mixed trunk is not possible for a family whose norms are folded",
                    hint="use --trunk base",
                )
            build.task(op, [piece], [out], **(params or {}))
        elif self.weights is None:
            build.copy(piece, out)
        else:
            build.task(
                "combine",
                [replace(piece, source=i) for i in range(len(self.sources))],
                [out],
                weights=self.weights,
            )


def is_ffn(chosen: Conversion, name: str) -> bool:
    """Whether a tensor is part of a text FFN that may become experts."""
    if chosen.stays_dense:
        return False
    found = chosen.match(name)
    role = str(found.slot.role) if found else ""
    return role.startswith("ffn.") and not role.endswith("_bias")


def _left_out(base: Checkpoint, chosen: Conversion) -> dict[str, str]:
    """Tensors that are not taken along, by name with the reason."""
    dropped = {n: why for n in base.tensors if (why := pairing.drops(n))}
    text = chosen.source.text(chosen.config)
    if text.get("tie_word_embeddings", base.config.get("tie_word_embeddings")):
        for name in chosen.source.tied:
            if chosen.prefix + name in base.tensors:
                dropped[chosen.prefix + name] = "tied to the embeddings by the config"
    return dropped


def _check_shape(base: Checkpoint, chosen: Conversion, name: str, inner: str) -> None:
    found, stored = chosen.source.match(inner), base.tensors[name]
    expected = chosen.source.shape(found.slot, chosen.source.text(chosen.config)) if found else None
    if expected is None or None in expected or tuple(expected) == stored.shape:
        return
    raise MoetoolError(
        "a tensor's shape does not fit the config",
        file=f"{base.folder}/{stored.file}",
        tensor=name,
        expected=list(expected),
        found=list(stored.shape),
        hint="config.json and weights are not of the same model",
    )
