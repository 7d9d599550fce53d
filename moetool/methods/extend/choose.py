"""Which experts are copied, in which layers: small, plain data that replays it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods import site
from moetool.methods.extend.look import Usage
from moetool.methods.reduce.decision import Decision

if TYPE_CHECKING:
    from moetool.methods.extend.options import Extending
    from moetool.surgery.experts import Mixture


@dataclass(frozen=True)
class Copies:
    """{layer: experts that are copied in it, one copy for each time they stand there}."""

    layers: Mapping[int, tuple[int, ...]]

    def as_json(self) -> JsonObject:
        return {"copies": {str(n): list(e) for n, e in sorted(self.layers.items())}}

    @classmethod
    def from_json(cls, data: JsonObject) -> Copies:
        """Read what `as_json` wrote; UsageError for anything else."""
        said = data.get("copies") if isinstance(data, dict) else None
        if not isinstance(said, dict) or not all(map(_is_row, said.items())):
            raise UsageError(
                "the decisions do not say which experts are copied",
                expected='{"copies": {"0": [3], "1": [5]}}',
                found=str(data)[:80],
                hint="leave the decisions as they were written",
            )
        return cls({int(n): tuple(e) for n, e in said.items()})

    def check(self, mixture: Mixture) -> None:
        """Refuse copies for another model."""
        known = {*mixture.layers, *mixture.mtp_layers}
        for layer, experts in self.layers.items():
            if layer not in known or not all(0 <= e < mixture.experts for e in experts):
                raise UsageError(
                    "these decisions are for another model",
                    tensor=f"layer {layer}",
                    expected=f"experts 0 to {mixture.experts - 1} in layers that hold them",
                    found=list(experts),
                    hint="leave the decisions as they were written",
                )

    def decision(self, layer: int, mixture: Mixture) -> Decision:
        """The layer's experts, each router group followed by the copies of its own."""
        size, copied = mixture.experts // mixture.groups, self.layers.get(layer, ())
        order: list[int] = []
        for group in range(mixture.groups):
            members = range(group * size, (group + 1) * size)
            order += [*members, *(e for e in copied if e in members)]
        return Decision(tuple((e,) for e in order))


def _is_row(said: tuple[str, object]) -> bool:
    number, experts = said
    numbers = isinstance(experts, list) and bool(experts) and all(type(e) is int for e in experts)
    return number.isascii() and number.isdigit() and len(number) < 10 and numbers


def choose(mixture: Mixture, options: Extending, seen: Usage) -> Copies:
    """What is copied. Raises UsageError for experts or layers that are not there, and MoetoolError
    for more than a router's groups can share out.
    """
    _check(mixture, options)
    found = {}
    for layer in _layers(mixture, options, seen):
        found[layer] = options.numbers * (1 if len(options.numbers) > 1 else options.copies)
        if not options.numbers:
            found[layer] = _used(mixture, options.copies, seen, layer)
    if len([n for n in found if n in mixture.layers]) == len(mixture.layers):
        for layer in mixture.mtp_layers:  # no text goes through them
            last = found[mixture.layers[-1]]
            found[layer] = last if options.numbers else _favoured(mixture, len(last), layer)
    return Copies(found)


def _check(mixture: Mixture, options: Extending) -> None:
    strange = [e for e in options.numbers if e >= mixture.experts]
    if strange:
        raise UsageError(
            f"--copy-expert {strange[0]} names an expert that is not there",
            expected=f"experts 0 to {mixture.experts - 1}",
            found=strange[0],
            hint="`moetool profile` shows which experts a text uses",
        )
    count = len(options.numbers) if len(options.numbers) > 1 else options.copies
    if len(options.numbers) > 1 and options.copies not in (1, count):
        raise UsageError(
            "--copy-expert names other than --copies experts",
            expected=f"{options.copies} experts, or no --copies",
            found=options.copy_expert,
            hint="each named expert is copied once",
        )
    if not options.numbers and count > mixture.experts:
        raise UsageError(
            "--copies is more than there are experts to copy",
            expected=f"at most {mixture.experts}",
            found=count,
            hint="--copy-expert N --copies M copies one expert M times",
        )
    if mixture.groups > 1 and (options.numbers or count % mixture.groups):
        raise MoetoolError(
            "the groups of a group-limited router must stay equal",
            file=mixture.source.folder,
            expected=f"--copy-expert auto with a multiple of {mixture.groups} copies: as many in "
            f"each of the {mixture.groups} groups",
            found=f"{count} copies",
            hint=f"--copies {mixture.groups}",
        )


def _layers(mixture: Mixture, options: Extending, seen: Usage) -> Sequence[int]:
    """Numbers of the layers that get copies: --layers counts decoder layers, and means those of
    them that hold experts.
    """
    if options.layers != "auto":
        named = site.parse(options.layers, mixture.text_model.field("layers") or 0)
        found = [n for n in mixture.layers if n in named]
        if not found:
            raise UsageError(
                f"--layers {options.layers} names no layer with experts",
                expected=f"some of {list(mixture.layers)[:16]}",
                found=options.layers,
                hint="--layers all",
            )
        return found
    ranked = sorted(mixture.layers, key=lambda n: (-seen.scores[n], n))
    return sorted(ranked[: max(1, len(ranked) // 2)])


def _used(mixture: Mixture, copies: int, seen: Usage, layer: int) -> tuple[int, ...]:
    """The most used experts of a layer, as many in each router group."""
    shares, size = seen.shares[layer], mixture.experts // mixture.groups
    found: list[int] = []
    for group in range(mixture.groups):
        members = range(group * size, (group + 1) * size)
        ranked = sorted(members, key=lambda e: (-shares[e], e))
        found += ranked[: copies // mixture.groups]
    return tuple(sorted(found))


def _favoured(mixture: Mixture, copies: int, layer: int) -> tuple[int, ...]:
    """In an MTP layer, which no text reaches: the experts with the longest router rows."""
    import numpy as np

    from moetool.methods.reduce import router_rows

    rows = router_rows.read(mixture, layer)
    seen = Usage({layer: np.linalg.norm(rows[: mixture.experts], axis=1)})
    return _used(mixture, copies, seen, layer)
