"""What was decided of a whole model, as files: decisions.json to replay, lists for servers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moetool import reading, strict_json
from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError, did_you_mean
from moetool.methods.reduce.decision import Decision, Where
from moetool.surgery import tables
from moetool.surgery.experts import Mixture

SCHEMA = 1
_KEYS = {"schema", "verb", "method", "experts", "layers", "orders", "refit"}
ORDERS = "decisions.tensors"  # neuron orders, beside decisions.json
_ALIGN = "align"


@dataclass(frozen=True)
class Decided:
    """All layers, and what they were decided with. `refit`: what is to be solved on, so that a
    replay does the same: {on, tokens, seq_len, seed}; empty where nothing is.
    """

    verb: str
    method: str
    experts: int
    layers: Mapping[int, Decision]
    refit: JsonObject = field(default_factory=dict)

    def as_json(self, orders: str = ORDERS) -> JsonObject:
        """Plain data; `orders`: the file in which neuron orders stand, where there are any."""
        data = {
            "schema": SCHEMA,
            "verb": self.verb,
            "method": self.method,
            "experts": self.experts,
            "layers": {str(n): self.layers[n].as_json() for n in sorted(self.layers)},
        }
        data |= {"refit": self.refit} if self.refit else {}
        return data | ({"orders": {"file": orders, "sha256": self.seal}} if self.packed else {})

    @cached_property
    def packed(self) -> bytes:
        """Neuron orders as a file (surgery/tables.py); empty where there are none."""
        made = self.tables()
        return tables.pack(made) if made else b""

    @cached_property
    def seal(self) -> str:
        return tables.sealed(self.packed)

    def files(self, name: str = "decisions.json") -> dict[str, bytes]:
        """The file of decisions, and the one of neuron orders where there are any."""
        orders = Path(name).with_suffix(Path(ORDERS).suffix).name
        body = {name: render(self.as_json(orders)).encode()}
        return body | ({orders: self.packed} if self.packed else {})

    def with_orders(self, found: Mapping[str, Sequence[int]], where: str = "decisions") -> Decided:
        """With neuron orders by the names of `tables`; those of other tables are left."""
        layers = dict(self.layers)
        for name, order in found.items():
            stem, _, place = name.partition(".")
            layer, _, expert = place.partition(".")
            if stem == _ALIGN and int(layer) in layers:
                old = layers[int(layer)]
                new = replace(old, orders={**old.orders, int(expert): tuple(order)})
                layers[int(layer)] = new.checked(Where(where, layer))
        return replace(self, layers=layers)

    def tables(self) -> dict[str, list[int]]:
        """Neuron orders under the names by which a plan looks them up."""
        made = {}
        for n, decision in sorted(self.layers.items()):
            for e, order in sorted(decision.orders.items()):
                made[order_key(n, e)] = list(order)
        return made

    @classmethod
    def from_json(cls, data: Any, where: str = "decisions") -> Decided:
        """Read what `as_json` wrote or a person edited; UsageError naming the layer for anything
        that does not hold together.
        """
        if (
            not isinstance(data, dict)
            or data.get("schema") != SCHEMA
            or not isinstance(data.get("layers"), dict)
        ):
            raise UsageError(
                "this is not a file of decisions",
                file=where,
                expected=f'{{"schema": {SCHEMA}, "experts": ..., "layers": {{"0": {{"keep": [...]}}}}}}',
                found=str(data)[:80],
                hint="make one with --dry-run --decisions FILE",
            )
        strange = sorted(set(data) - _KEYS)
        if strange:
            raise UsageError(
                "the decisions say something that nobody reads",
                file=where,
                expected=", ".join(sorted(_KEYS)),
                found=strange[0],
                hint=did_you_mean(strange[0], _KEYS),
            )
        experts = data.get("experts")
        if type(experts) is not int:
            raise UsageError(
                "the decisions do not say how many experts there were",
                file=where,
                expected="experts: a number",
                found=experts,
                hint="make the file again with --dry-run --decisions FILE",
            )
        return cls(
            str(data.get("verb", "")),
            str(data.get("method", "")),
            experts,
            {
                _number(n, where): Decision.from_json(v, experts, Where(where, n))
                for n, v in data["layers"].items()
            },
            _refit(data.get("refit", {}), where),
        )

    def check(self, mixture: Mixture, where: str) -> None:
        """Refuse decisions for another model."""
        wanted = [*mixture.layers, *mixture.mtp_layers]
        if self.experts != mixture.experts or sorted(self.layers) != wanted:
            raise UsageError(
                "these decisions are for another model",
                file=where,
                expected=f"{mixture.experts} experts in layers {wanted[0]} to {wanted[-1]}",
                found=f"{self.experts} experts in {len(self.layers)} layers",
                hint="make them again with --dry-run --decisions FILE",
            )
        for number, layer in self.layers.items():
            wide = mixture.width(number) if layer.orders else 0
            wrong = [e for e, order in layer.orders.items() if len(order) != wide]
            if wrong:
                raise UsageError(
                    "a neuron order is not as wide as the experts",
                    file=where,
                    tensor=f"layer {number}, expert {wrong[0]}",
                    expected=f"{wide} neurons",
                    found=f"{len(layer.orders[wrong[0]])} neurons",
                    hint="leave `orders` as they were written",
                )


def order_key(layer: int, expert: int) -> str:
    """Name of an expert's neuron order among a plan's tables."""
    return f"{_ALIGN}.{layer}.{expert}"


def render(decisions: JsonObject) -> str:
    """Decisions as JSON text, a layer on a line: short to read, easy to diff and edit."""
    return strict_json.lined(decisions, "layers") + "\n"


def _refit(said: Any, where: str) -> JsonObject:
    """What decisions say of a refit, which people may have edited."""
    kinds = {"on": str, "tokens": int, "seq_len": int, "seed": int}
    whole = isinstance(said, dict) and all(type(said.get(k)) is kind for k, kind in kinds.items())
    if said != {} and not (whole and set(said) == set(kinds)):
        raise UsageError(
            "the decisions do not say what a refit is to be solved on",
            file=where,
            expected='refit: {"on": "own", "tokens": ..., "seq_len": ..., "seed": ...}',
            found=str(said)[:80],
            hint="take refit out of the file, and give --calibrate FILE where there is to be one",
        )
    return dict(said)


def read(path: str | Path) -> Decided:
    """Decisions from a file; UsageError when it is missing or malformed."""
    try:
        text = reading.read(path, "decisions").decode("utf-8")
        data = json.loads(text, object_pairs_hook=_once)
    except FileNotFoundError:
        raise UsageError(
            "there are no decisions here",
            file=path,
            hint="write them first: --dry-run --decisions FILE",
        ) from None
    except (OSError, ValueError, RecursionError, MoetoolError) as problem:
        said = problem.message if isinstance(problem, MoetoolError) else str(problem)
        raise UsageError(
            f"the decisions are not JSON: {said[:200]}",
            file=path,
            hint="correct the file, or make it again with --dry-run --decisions FILE",
        ) from None
    made = Decided.from_json(data, str(path))
    return made.with_orders(_orders(data.get("orders"), Path(path)), str(path))


def _orders(said: Any, path: Path) -> dict[str, list[int]]:
    """Neuron orders of the file that decisions name; it lies beside them."""
    if said is None:
        return {}
    keys = {"file", "sha256"}
    if not isinstance(said, dict) or set(said) != keys or not all(map(_is_text, said.values())):
        raise UsageError(
            "the decisions do not say where their neuron orders are",
            file=path,
            expected='{"file": NAME, "sha256": SEAL}',
            found=str(said)[:80],
            hint="leave `orders` as they were written",
        )
    if Path(said["file"]).name != said["file"]:
        raise UsageError(
            "neuron orders lie beside their decisions",
            file=path,
            expected="the name of a file",
            found=said["file"][:80],
            hint="leave `orders` as they were written",
        )
    return tables.unpack(path.with_name(said["file"]), said["sha256"])


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _once(pairs: list[tuple[str, Any]]) -> JsonObject:
    """An object whose keys are all different: Python would take the last of two."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return made


def _number(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and str(int(text)) == text):
        raise UsageError(
            "a layer is not a number",
            file=where,
            found=text,
            hint="layers are written as in the model: 0, 1, 2",
        )
    return int(text)


def experts_lists(decided: Decided) -> dict[str, bytes]:
    """The plain lists that serving engines take for pruning the *original* at load time.

    experts.json: {num_experts, layers: {"3": {kept, pruned}}} (profiles as in vllm#37824 and
    #42613); experts.jsonl: a line a layer with all experts, those to keep first and best first, as
    vllm-ascend#12525 reads it with its own ratio. For merges: the leads of the clusters.
    """
    layers, lines = {}, []
    for n in sorted(decided.layers):
        layer, every = decided.layers[n], range(decided.experts)
        kept = [e for e in layer.leads if e not in layer.constant]
        score = layer.scores or tuple(-e for e in every)
        order = sorted(every, key=lambda e: (e not in kept, -score[e], e))
        layers[str(n)] = {"kept": kept, "pruned": [e for e in every if e not in kept]}
        lines.append(json.dumps({str(n): order}))
    head = {"num_experts": decided.experts, "method": decided.method}
    return {
        "experts.json": (json.dumps(head | {"layers": layers}) + "\n").encode(),
        "experts.jsonl": ("\n".join(lines) + "\n").encode(),
    }
