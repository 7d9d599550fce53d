"""Which layers hold experts: each way a family's config says it, read and written in one place.

A family's way stands in archs/overlay.json under `sites`, as the names of the config fields that
take part; their names decide the class. A family without one has experts in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moetool.data import JsonMapping, JsonObject

Text = JsonMapping  # the text part of a config, the class's defaults filled in
Fields = JsonObject


class CannotHold(ValueError):
    """A family cannot keep experts in just these layers; the message says why."""


@dataclass(frozen=True)
class Sites:
    """Experts in every layer: what holds where a config has no say in it."""

    def layers(self, text: Text, count: int) -> set[int]:
        """Numbers of the layers with experts, of a model with `count` layers."""
        return set(range(count))

    def fields(self, layers: Sequence[int], count: int, width: int) -> Fields:
        """The config fields that say so; `width` is that of the dense layers that stay.

        Raises CannotHold where no value of the fields means these layers.
        """
        dense = _others(layers, count)
        if dense:
            raise CannotHold(
                f"has experts in every layer (here {len(dense)} of {count} would stay dense)"
            )
        return {}


@dataclass(frozen=True)
class DenseList(Sites):
    """A list of dense layers and a stride (Qwen's mlp_only_layers, decoder_sparse_step)."""

    dense_list: str
    step: str

    def layers(self, text: Text, count: int) -> set[int]:
        dense = text.get(self.dense_list) or ()
        return _every(range(count), text.get(self.step)) - set(dense)

    def fields(self, layers: Sequence[int], count: int, width: int) -> Fields:
        return {self.dense_list: _others(layers, count), self.step: 1}


@dataclass(frozen=True)
class MoeList(Sites):
    """A list of MoE layers, or a stride where there is none (Llama 4)."""

    list: str
    step: str

    def layers(self, text: Text, count: int) -> set[int]:
        listed = text.get(self.list)
        if isinstance(listed, Sequence):
            return set(listed)
        return _every(range(count), text.get(self.step))

    def fields(self, layers: Sequence[int], count: int, width: int) -> Fields:
        return {self.list: [*layers], self.step: 1}


@dataclass(frozen=True)
class DensePrefix(Sites):
    """A number of dense layers before the first MoE layer (DeepSeek, GLM)."""

    dense_prefix: str

    def layers(self, text: Text, count: int) -> set[int]:
        return set(range(text.get(self.dense_prefix) or 0, count))

    def fields(self, layers: Sequence[int], count: int, width: int) -> Fields:
        dense = _others(layers, count)
        if dense != [*range(len(dense))]:
            raise CannotHold(
                "keeps dense layers only before the first MoE layer (use --layers last:N)"
            )
        return {self.dense_prefix: len(dense)}


@dataclass(frozen=True)
class Period(Sites):
    """Every n-th layer, from an offset on (Jamba): `period` names the two fields."""

    period: tuple[str, str]

    def layers(self, text: Text, count: int) -> set[int]:
        every, offset = (text.get(f) for f in self.period)
        return {i for i in range(count) if i % (every or 1) == (offset or 0)}

    def fields(self, layers: Sequence[int], count: int, width: int) -> Fields:
        every, offset = self.period
        for stride in range(1, count + 1):
            if layers and [*range(layers[0], count, stride)] == [*layers] and layers[0] < stride:
                return {every: stride, offset: layers[0]}
        raise CannotHold("takes a stride and an offset only")


@dataclass(frozen=True)
class Types(Sites):
    """A word for each layer, `sparse` or `dense` (mlp_layer_types). `dense_width`: the field with
    the width of the dense layers, where that is not the usual one.
    """

    types: str
    dense_width: str | None = None

    def layers(self, text: Text, count: int) -> set[int]:
        kinds = text.get(self.types)
        if not isinstance(kinds, Sequence):
            return set(range(count))
        return {i for i, kind in enumerate(kinds) if kind == "sparse"}

    def fields(self, layers: Sequence[int], count: int, width: int) -> Fields:
        kinds = ["sparse" if i in layers else "dense" for i in range(count)]
        wide = {self.dense_width: width} if self.dense_width and "dense" in kinds else {}
        return {self.types: kinds} | wide


@dataclass(frozen=True)
class Range(Sites):
    """A first and a last layer and a stride between them (Ernie): `range` names the fields."""

    range: tuple[str, str, str]

    def layers(self, text: Text, count: int) -> set[int]:
        start, end, step = (text.get(f) for f in self.range)
        last = count - 1 if end in (None, -1) else int(end)
        return {i for i in _every(range(count), step) if (start or 0) <= i <= last}

    def fields(self, layers: Sequence[int], count: int, width: int) -> Fields:
        start, end, step = self.range
        for stride in range(1, count + 1):
            if layers and _every(range(layers[0], layers[-1] + 1), stride) == set(layers):
                return {start: layers[0], end: layers[-1], step: stride}
        raise CannotHold("takes a first and last layer and a stride only")


# the key that is there in every entry of a way
_WAYS: dict[str, Callable[..., Sites]] = {
    "dense_list": DenseList,
    "list": MoeList,
    "dense_prefix": DensePrefix,
    "period": Period,
    "types": Types,
    "range": Range,
}


def read(data: JsonMapping | None) -> Sites:
    """The way of a family from its overlay; TypeError for keys that are no way's."""
    if data is None:
        return Sites()
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    for key, way in _WAYS.items():
        if key in data:
            return way(**values)
    raise TypeError(f"sites has none of the known keys: {', '.join(data) or 'nothing'}")


def _every(numbers: range, step: int | None) -> set[int]:
    """Those of the numbers where a layer counted from one is a multiple of the step."""
    return {i for i in numbers if (i + 1) % (step or 1) == 0}


def _others(layers: Sequence[int], count: int) -> list[int]:
    return [i for i in range(count) if i not in layers]
