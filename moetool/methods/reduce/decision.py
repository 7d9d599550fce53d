"""What was decided of a model's experts: small, JSON, to be read, edited and replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moetool.errors import MoetoolError, UsageError, did_you_mean
from moetool.surgery.experts import Mixture

SCHEMA = 1
_LAYER_KEYS = {"keep", "groups", "weights", "scores", "protected", "constant", "sparsity", "orders"}


@dataclass(frozen=True)
class Layer:
    """New expert j is made from the old experts groups[j] with weights[j] (summing to 1); the
    first of a group leads: its name order and, by default, its router row. `constant`: experts
    that stay as constants (MoNE).
    """

    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...] = ()
    scores: tuple[float, ...] = ()
    protected: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    sparsity: float = 0.0  # share of each kept matrix's weights that is zeroed as well (STUN)
    orders: Mapping[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # a merged expert's neurons in its lead's order

    @classmethod
    def keep(cls, experts: Sequence[int], **more: Any) -> Layer:
        """These experts stay as they are, the others go."""
        return cls(tuple((int(e),) for e in sorted(experts)), **more)

    @property
    def count(self) -> int:
        return len(self.groups)

    @property
    def leads(self) -> list[int]:
        return [g[0] for g in self.groups]

    def weight(self, group: int) -> tuple[float, ...]:
        """Weights of a group, uniform where none are given."""
        return (
            self.weights[group]
            if self.weights
            else (1.0 / len(self.groups[group]),) * len(self.groups[group])
        )

    def map(self, experts: int) -> list[int | None]:
        """old expert -> new expert, None where it went."""
        to: list[int | None] = [None] * experts
        for new, members in enumerate(self.groups):
            for old in members:
                to[old] = new
        return to

    def sorted(self) -> Layer:
        """Groups in the order of their leads: routers with groups of experts need it, people like
        it.
        """
        order = sorted(range(len(self.groups)), key=lambda j: self.groups[j][0])
        return replace(
            self,
            groups=tuple(self.groups[j] for j in order),
            weights=tuple(self.weights[j] for j in order) if self.weights else (),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data; `keep` where nothing is merged."""
        merged = any(len(g) > 1 for g in self.groups)
        data: dict[str, Any] = (
            {
                "groups": [list(g) for g in self.groups],
                "weights": [list(self.weight(j)) for j in range(self.count)],
            }
            if merged
            else {"keep": self.leads}
        )
        extra = {
            "scores": [float(f"{s:.8g}") for s in self.scores],
            "protected": list(self.protected),
            "constant": list(self.constant),
            "sparsity": self.sparsity,
            "orders": {str(e): list(o) for e, o in self.orders.items()},
        }
        return data | {k: v for k, v in extra.items() if v}


@dataclass(frozen=True)
class Decided:
    """All layers, and what they were decided with."""

    verb: str
    method: str
    experts: int
    layers: Mapping[int, Layer]

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "verb": self.verb,
            "method": self.method,
            "experts": self.experts,
            "layers": {str(n): self.layers[n].as_json() for n in sorted(self.layers)},
        }

    def tables(self) -> dict[str, list[int]]:
        """Neuron orders under the names by which a plan looks them up."""
        return {
            order_key(n, e): list(order)
            for n, layer in sorted(self.layers.items())
            for e, order in sorted(layer.orders.items())
        }

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
        experts = data.get("experts")
        if not isinstance(experts, int):
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
            {_number(n, where): _layer(v, experts, n, where) for n, v in data["layers"].items()},
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


def order_key(layer: int, expert: int) -> str:
    """Name of an expert's neuron order among a plan's tables."""
    return f"align.{layer}.{expert}"


def render(decisions: dict[str, Any]) -> str:
    """Decisions as JSON text, a layer on a line: short to read, easy to diff and edit."""
    head = json.dumps({k: v for k, v in decisions.items() if k != "layers"})[1:-1]
    layers = ",\n  ".join(
        f"{json.dumps(n)}: {json.dumps(layer)}" for n, layer in decisions["layers"].items()
    )
    return f'{{{head},\n "layers": {{\n  {layers}\n }}\n}}\n'


def read(path: str | Path) -> Decided:
    """Decisions from a file; UsageError when it is missing or malformed."""
    try:
        data = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UsageError(
            "there are no decisions here",
            file=path,
            hint="write them first: --dry-run --decisions FILE",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise UsageError(
            f"the decisions are not JSON: {problem}",
            file=path,
            hint="correct the file, or make it again with --dry-run --decisions FILE",
        ) from None
    return Decided.from_json(data, str(path))


def _number(text: str, where: str) -> int:
    if not text.isdigit():
        raise UsageError(
            "a layer is not a number",
            file=where,
            found=text,
            hint="layers are written as in the model: 0, 1, 2",
        )
    return int(text)


def _layer(data: Any, experts: int, layer: str, where: str) -> Layer:
    if (
        not isinstance(data, dict)
        or set(data) - _LAYER_KEYS
        or not ({"keep", "groups"} & set(data))
    ):
        wrong = sorted(set(data) - _LAYER_KEYS) if isinstance(data, dict) else [str(data)[:40]]
        raise UsageError(
            "a layer's decision is malformed",
            file=where,
            tensor=f"layer {layer}",
            expected="keep or groups",
            found=", ".join(wrong) or "neither",
            hint=did_you_mean(wrong[0], _LAYER_KEYS) if wrong else "name the experts to keep",
        )
    try:
        groups = (
            tuple((int(e),) for e in data["keep"])
            if "keep" in data
            else tuple(tuple(int(e) for e in g) for g in data["groups"])
        )
        weights = tuple(tuple(float(w) for w in row) for row in data.get("weights", ()))
        made = Layer(
            groups,
            weights,
            tuple(map(float, data.get("scores", ()))),
            tuple(map(int, data.get("protected", ()))),
            tuple(map(int, data.get("constant", ()))),
            float(data.get("sparsity", 0.0)),
            {int(e): tuple(map(int, o)) for e, o in data.get("orders", {}).items()},
        )
    except (TypeError, ValueError, AttributeError) as problem:
        raise UsageError(
            f"a layer's decision is malformed: {problem}",
            file=where,
            tensor=f"layer {layer}",
            hint="experts are whole numbers, weights numbers",
        ) from None
    used = [e for g in made.groups for e in g]
    if (
        not used
        or min(used) < 0
        or max(used) >= experts
        or len(set(used)) < len(used)
        or not all(made.groups)
    ):
        raise UsageError(
            "a layer's experts do not fit",
            file=where,
            tensor=f"layer {layer}",
            expected=f"each of 0 to {experts - 1} at most once, and at least one",
            found=str(used)[:80],
            hint="correct the list",
        )
    if weights and [len(w) for w in weights] != [len(g) for g in made.groups]:
        raise UsageError(
            "weights and groups of a layer do not match",
            file=where,
            tensor=f"layer {layer}",
            expected=[len(g) for g in made.groups][:8],
            found=[len(w) for w in weights][:8],
            hint="one weight for each expert of a group",
        )
    if any(sorted(order) != list(range(len(order))) for order in made.orders.values()):
        raise UsageError(
            "a neuron order is no permutation",
            file=where,
            tensor=f"layer {layer}",
            hint="leave `orders` as they were written",
        )
    if any(not abs(sum(row) - 1.0) < 1e-6 for row in weights):
        raise UsageError(
            "the weights of a group do not sum to 1",
            file=where,
            tensor=f"layer {layer}",
            found=next(sum(r) for r in weights if not abs(sum(r) - 1.0) < 1e-6),
            expected=1,
            hint="correct them, or leave `weights` out for a plain mean",
        )
    return made.sorted()


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


def checked_counts(decided: Decided, mixture: Mixture) -> None:
    """Refuse decisions that leave a router less than it needs. Raises MoetoolError before any work."""
    for number, layer in decided.layers.items():
        check_count(mixture, layer.count, number)
        if mixture.groups > 1 and number in mixture.layers:
            size = mixture.experts // mixture.groups
            kept = [sum(e // size == g for e in layer.leads) for g in range(mixture.groups)]
            if len(set(kept)) > 1:
                raise MoetoolError(
                    "the groups of a group-limited router must stay equal",
                    tensor=f"layer {number}",
                    expected=f"{layer.count // mixture.groups} experts in each of {mixture.groups} groups",
                    found=kept,
                    hint="keep as many in each group",
                )


def check_count(mixture: Mixture, count: int, layer: int | None = None) -> None:
    """Refuse fewer experts than a token needs; group-limited routers reach only their best groups."""
    where = {} if layer is None else {"tensor": f"layer {layer}"}
    reach = count + mixture.zero_experts
    text = mixture.text
    if mixture.groups > 1:
        if count % mixture.groups:
            raise MoetoolError(
                "the groups of a group-limited router must stay equal",
                **where,
                expected=f"a multiple of {mixture.groups} experts",
                found=count,
                hint="choose another --ratio",
            )
        reach = count // mixture.groups * int(text.get("topk_group") or 1)
    if reach < mixture.top_k:
        raise MoetoolError(
            "too few experts would be left",
            **where,
            expected=f"at least {mixture.top_k} within a token's reach (its top-k)",
            found=f"{count} kept"
            + (f", {reach} in reach of the groups" if mixture.groups > 1 else ""),
            hint="lower --ratio",
        )
