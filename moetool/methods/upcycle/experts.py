"""Write one MoE layer: its FFN as experts, with router, side tensors and shared expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

from moetool.errors import MoetoolError
from moetool.methods.contract import Builder
from moetool.methods.upcycle.diversify import Diversify
from moetool.methods.upcycle.route import Router
from moetool.methods.upcycle.targets import Conversion
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.family import SharedExpert
from moetool.surgery.spec import FLOATS, Piece, Target, rows, whole

MATRICES = ("gate", "up", "down")
_BESIDE = {"gate_up": ("gate", "up"), "down": ("down",)}  # in one matrix of a stack
# A shared expert's switch is to be sigmoid(0) = 1/2. llama.cpp computes the sigmoid of x as
# silu(x) / x, which is no number at 0: so the switch is not zero, but so small that 1/2 stays
# exact in float32. float16 has no such number: there it is the smallest that it has, and the
# sigmoid is 1/2 exactly in float16, and to 1e-6 in float32.
SMALL, SWITCH = 1e-20, {"F16": 2.0**-24}


@dataclass(frozen=True)
class Ffn:
    """The three matrices of a gated FFN as pieces: gate and up [width, hidden], down [hidden,
    width].
    """

    gate: Piece
    up: Piece
    down: Piece
    width: int
    hidden: int
    dtype: str

    @classmethod
    def read(cls, source: Checkpoint, chosen: Conversion, layer: int, number: int = 0) -> Ffn:
        """Find them by role; MoetoolError where one is missing or does not fit the others."""
        layout = chosen.source

        def stored(role: str) -> Any:
            slot = layout.role(role)
            return (
                source.tensor(chosen.prefix + slot.name.replace("{layer}", str(layer)))
                if slot
                else None
            )

        down, both = stored("ffn.down"), stored("ffn.gate_up")
        if down is None or (both is None and layout.role("ffn.gate") is None):
            raise MoetoolError(
                f"{layout.model_type} has no gated FFN that can become experts",
                hint=f"see `moetool archs show {layout.model_type}`",
            )
        if down.dtype not in FLOATS:
            raise MoetoolError(
                "the weights are not plain floats",
                file=f"{source.folder}/{down.file}",
                tensor=down.name,
                expected=", ".join(FLOATS),
                found=down.dtype,
                hint="dequantize the model first",
            )
        hidden, width = down.shape
        if both is not None:
            _fit(source, both, (2 * width, hidden))
            gate, up = rows(both, 0, width, number), rows(both, width, 2 * width, number)
        else:
            gate_stored, up_stored = stored("ffn.gate"), stored("ffn.up")
            for matrix in (gate_stored, up_stored):
                _fit(source, matrix, (width, hidden))
            gate, up = whole(gate_stored, number), whole(up_stored, number)
        size = layout.text(chosen.config).get(layout.fields.get("hidden", ""))
        if size is not None and size != hidden:
            raise MoetoolError(
                "an FFN does not fit the config",
                file=f"{source.folder}/{down.file}",
                tensor=down.name,
                expected=f"hidden size {size}",
                found=list(down.shape),
                hint="config.json and weights are not of the same model",
            )
        return cls(gate, up, whole(down, number), width, hidden, down.dtype)


def _fit(source: Checkpoint, stored: Any, shape: tuple[int, int]) -> None:
    if stored.shape != shape:
        raise MoetoolError(
            "the matrices of an FFN do not fit each other",
            file=f"{source.folder}/{stored.file}",
            tensor=stored.name,
            expected=list(shape),
            found=list(stored.shape),
            hint="config.json and weights are not of the same model",
        )


@dataclass(frozen=True)
class Layer:
    """What one MoE layer is to be."""

    number: int
    experts: int
    split: int
    origin: tuple[int, ...]
    order: str | None
    diversify: Diversify
    router: Router
    scale: float
    shared: bool
    fused: bool
    seed: int
    silent: bool = False  # routed experts start at zero output


def write_moe(
    build: Builder, sources: Sequence[Checkpoint], chosen: Conversion, layer: Layer
) -> None:
    """Plan all tensors of a MoE layer: router, side tensors, experts, shared expert."""
    ffns = [Ffn.read(s, chosen, layer.number, i) for i, s in enumerate(sources)]
    for other in ffns[1:]:
        if (other.width, other.hidden, other.dtype) != (
            ffns[0].width,
            ffns[0].hidden,
            ffns[0].dtype,
        ):
            raise MoetoolError(
                "sources have FFNs of different shape",
                tensor=other.down.name,
                expected=list(ffns[0].down.shape),
                found=list(other.down.shape),
                hint="all sources must be fine-tunes of one model",
            )
    width = ffns[0].width // layer.split
    turned = _turns(chosen, layer, width, ffns[0].hidden)
    places = (_turned if turned else _places)(build, chosen, layer, width, ffns[0])
    for role, found in places.items():
        for number, first, outs in _runs(layer, found):
            if turned:
                _turn(build, ffns[number], role, outs, first, layer)
            else:
                _experts(build, role, getattr(ffns[number], role), outs, first, layer)
    _router(build, chosen, layer, ffns[0])
    if chosen.target.overlay.shared:
        _shared(build, chosen, layer, ffns[0])


class GivenExperts(NamedTuple):
    """Experts that are there already: the layer's own FFN, one FFN each, what each one's output is
    multiplied by, and the router.
    """

    ffn: Ffn
    experts: Sequence[Ffn]
    scales: Sequence[float]
    router: GivenRouter


class GivenRouter(NamedTuple):
    """A router that is there already: its rows, by the operation that makes them of `parts`
    (`zeros`: of none), and what they are multiplied by.
    """

    op: str
    parts: Sequence[Piece] = ()
    scale: float = 1.0

    def write(self, build: Builder, into: Piece) -> None:
        """Plan its rows [experts, hidden]."""
        if self.op == "copy" and self.scale == 1.0:
            build.copy(self.parts[0], into)
        elif self.op == "zeros":
            build.task("zeros", [], [into])
        else:
            op = "affine" if self.op == "copy" else self.op
            build.task(op, self.parts, [into], scale=self.scale)


def write_given(build: Builder, chosen: Conversion, layer: Layer, given: GivenExperts) -> None:
    """Plan all tensors of a MoE layer whose experts and router are given; the FFN becomes the
    shared expert where the layer has one.
    """
    first = given.experts[0]
    turned = _turns(chosen, layer, first.width, first.hidden)
    places = (_turned if turned else _places)(build, chosen, layer, first.width, first)
    for number, (ffn, scale) in enumerate(zip(given.experts, given.scales, strict=True)):
        for role, found in places.items():
            out, factor = found[number], scale if role == "down" else 1.0
            if turned:
                _slabs(build, ffn, role, [out], scale=factor)
            elif factor != 1.0:
                build.task("affine", [getattr(ffn, role)], [out], scale=factor)
            else:
                build.copy(getattr(ffn, role), out)
    given.router.write(build, whole(_routed(build, chosen, layer, given.ffn)))
    if chosen.target.overlay.shared:
        _shared(build, chosen, layer, given.ffn)


def _name(chosen: Conversion, template: str, layer: int, expert: int | None = None) -> str:
    return chosen.prefix + template.replace("{layer}", str(layer)).replace("{expert}", str(expert))


def _places(
    build: Builder, chosen: Conversion, layer: Layer, width: int, ffn: Ffn
) -> dict[str, list[Piece]]:
    """Announce the expert tensors; returns where each expert's gate, up and down go."""
    shapes = {"gate": (width, ffn.hidden), "up": (width, ffn.hidden), "down": (ffn.hidden, width)}
    if not layer.fused:
        names = chosen.target.per_expert()
        places: dict[str, list[Piece]] = {m: [] for m in MATRICES}
        for expert in range(layer.experts):
            for matrix in MATRICES:
                places[matrix].append(
                    whole(
                        build.target(
                            _name(chosen, names[matrix], layer.number, expert),
                            ffn.dtype,
                            shapes[matrix],
                        )
                    )
                )
        return places
    names = chosen.target.fused()
    both = build.target(
        _name(chosen, names["gate_up"], layer.number),
        ffn.dtype,
        (layer.experts, 2 * width, ffn.hidden),
    )
    down = build.target(
        _name(chosen, names["down"], layer.number), ffn.dtype, (layer.experts, ffn.hidden, width)
    )
    slab = width * ffn.hidden
    return {
        "gate": [Piece(both.name, shapes["gate"], 2 * e * slab) for e in range(layer.experts)],
        "up": [Piece(both.name, shapes["up"], (2 * e + 1) * slab) for e in range(layer.experts)],
        "down": [Piece(down.name, shapes["down"], e * slab) for e in range(layer.experts)],
    }


def _turns(chosen: Conversion, layer: Layer, width: int, hidden: int) -> bool:
    """Whether stacks are written [experts, in, out], as the Hub has this family's: every client
    reads those. Not where transformers 5 could not tell, which looks at the shape.
    """
    turns = layer.fused and chosen.target.overlay.turns_stacks
    return turns and hidden not in (width, 2 * width)


def _turned(
    build: Builder, chosen: Conversion, layer: Layer, width: int, ffn: Ffn
) -> dict[str, list[Piece]]:
    """Announce stacks [experts, in, out]; returns where each expert's gate_up and down go."""
    names, places = chosen.target.fused(), {}
    for role, shape in (("gate_up", (ffn.hidden, 2 * width)), ("down", (width, ffn.hidden))):
        name = _name(chosen, names[role], layer.number)
        target = build.target(name, ffn.dtype, (layer.experts, *shape))
        slabs = range(0, layer.experts * prod(shape), prod(shape))
        places[role] = [Piece(target.name, shape, offset) for offset in slabs]
    return places


def _turn(build: Builder, ffn: Ffn, role: str, outs: list[Piece], first: int, layer: Layer) -> None:
    """A run of experts in stacks [experts, in, out]."""
    if role == "down" and layer.silent:
        for out in outs:
            build.task("zeros", [], [out])
        return
    each = [layer.diversify.params(layer.number, m, layer.seed) for m in _BESIDE[role]]
    cut = {"parts": layer.split, "order": layer.order, "first": first}
    scale = layer.scale if role == "down" else 1.0
    _slabs(build, ffn, role, outs, each=each, scale=scale, **cut)


def _slabs(build: Builder, ffn: Ffn, role: str, outs: list[Piece], **params: Any) -> None:
    matrices = [getattr(ffn, m) for m in _BESIDE[role]]
    params = {"axis": int(role == "down"), "each": [{} for _ in matrices]} | params
    build.task("slabs", matrices, outs, **params)


class Run(NamedTuple):
    """Neighbouring experts that come from one source: its number, the first of them, and where
    one matrix of each goes.
    """

    source: int
    first: int
    places: list[Piece]


def _runs(layer: Layer, places: list[Piece]) -> Iterator[Run]:
    for source, run in groupby(range(layer.experts), key=lambda e: layer.origin[e]):
        experts = list(run)
        yield Run(source, experts[0], places[experts[0] : experts[-1] + 1])


def _experts(
    build: Builder, matrix: str, piece: Piece, outs: list[Piece], first: int, layer: Layer
) -> None:
    """One matrix of a run of experts: byte copies where nothing is computed, one `neurons` task
    otherwise.
    """
    if matrix == "down" and layer.silent:
        for out in outs:
            build.task("zeros", [], [out])
        return
    axis = 1 if matrix == "down" else 0
    params = layer.diversify.params(layer.number, matrix, layer.seed)
    factor = layer.scale if matrix == "down" else 1.0
    cut_rows = axis == 0 and layer.order is None
    if not params and factor == 1.0 and (layer.split == 1 or cut_rows):
        height = piece.shape[0] // layer.split if axis == 0 else piece.shape[0]
        for number, out in enumerate(outs):
            part = (first + number) % layer.split
            build.copy(
                piece
                if layer.split == 1
                else replace(rows(piece, part * height, (part + 1) * height), source=piece.source),
                out,
            )
        return
    build.task(
        "neurons",
        [piece],
        outs,
        axis=axis,
        parts=layer.split,
        order=layer.order,
        first=first,
        scale=factor,
        **params,
    )


def _router(build: Builder, chosen: Conversion, layer: Layer, ffn: Ffn) -> None:
    target = _routed(build, chosen, layer, ffn)
    if layer.router.law == "zero":
        build.zeros(target)
    else:
        build.task("draw", [], [whole(target)], **layer.router.params(layer.seed, target.name))


def _routed(build: Builder, chosen: Conversion, layer: Layer, ffn: Ffn) -> Target:
    """Announce the router; its bias, where the family has one, is zero."""
    slot = chosen.target.role("router")
    assert slot is not None
    target = build.target(
        _name(chosen, slot.name, layer.number), ffn.dtype, (layer.experts, ffn.hidden)
    )
    bias = chosen.target.role("router.bias")
    if bias is not None and bias.shape is not None:
        shape = (1, layer.experts) if len(bias.shape) == 2 else (layer.experts,)
        build.zeros(build.target(_name(chosen, bias.name, layer.number), "F32", shape))
    return target


def _shared(build: Builder, chosen: Conversion, layer: Layer, ffn: Ffn) -> None:
    """The always-on FFN; a family that always has the tensors gets zeros when it is not wished."""
    rule = chosen.target.overlay.shared
    assert rule is not None
    width = ffn.width if layer.shared else idle_width(rule, ffn.width // layer.split)
    small = SWITCH.get(ffn.dtype, SMALL)
    shapes = {"gate": (width, ffn.hidden), "up": (width, ffn.hidden), "down": (ffn.hidden, width)}
    for matrix in MATRICES:
        slot = chosen.target.role(f"shared.{matrix}")
        if slot is None or (not layer.shared and not rule.always):
            continue
        target = build.target(_name(chosen, slot.name, layer.number), ffn.dtype, shapes[matrix])
        if not layer.shared:
            build.zeros(target)
        elif matrix == "down" and rule.gated:
            build.task("affine", [ffn.down], [whole(target)], scale=2.0)  # sigmoid(0) = 1/2
        else:
            build.copy(getattr(ffn, matrix), whole(target))
    switch = chosen.target.role("shared.switch")
    if switch is not None and (layer.shared or rule.always):
        name = _name(chosen, switch.name, layer.number)
        target = build.target(name, ffn.dtype, (1, ffn.hidden))
        build.task("fill", [], [whole(target)], value=small)


def idle_width(rule: SharedExpert, expert_width: int) -> int:
    """Width of a shared expert that must exist but is not wished: zeros load in more places than
    empty tensors.
    """
    return rule.idle * expert_width if rule.count else min(rule.idle, expert_width)
