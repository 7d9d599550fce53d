"""Super experts: the few whose enormous outputs make the massive activations that attention sinks
stand on; removing 3 of 6,144 ruins a model (arXiv 2507.23279).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from moetool.data import JsonObject

if TYPE_CHECKING:
    from moetool.forward.stats import Profile
    from moetool.surgery.experts import Mixture

DEPTH = 0.75  # of all decoder layers, from the first
PERCENTILE = 99.5
SHARE = 0.1  # of the largest
MASSIVE = 1000.0  # times the median magnitude of a token's state (arXiv 2402.17762)
RAISED = 1.1  # times what the layer below left: made there, not only handed on


@dataclass(frozen=True)
class Peak:
    """The largest |output of down_proj| of an expert. times: that of the largest expert which is
    not super.
    """

    layer: int
    expert: int
    output: float
    times: float = 0.0
    super: bool = False

    def as_json(self) -> JsonObject:
        return asdict(self) | {"output": _short(self.output), "times": _short(self.times)}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def found(profile: Profile, mixture: Mixture) -> tuple[Peak, ...]:
    """`super_experts` of a model from its statistics."""
    layers = int(mixture.layout.field("layers", mixture.text_model.config))
    seen = {n: profile.layer(n) for n in mixture.layers}
    streams = {n: s.stream for n, s in seen.items() if s.has("stream")}
    return super_experts({n: s.max_out for n, s in seen.items()}, streams, layers)


def super_experts(
    largest: Mapping[int, np.ndarray], streams: Mapping[int, np.ndarray], layers: int
) -> tuple[Peak, ...]:
    """The super experts, the largest first; where there is none, the largest expert of all.

    largest[layer] [experts]: max |output of down_proj| over the calibration tokens; streams[layer]
    as forward/stats.py says (statistics of before have none: every layer may form them then).
    Super is who lies above the 99.5th percentile of all experts and above a tenth of the largest,
    in a layer that forms massive activations, in the first 75 % of the model's decoder layers, by
    real layer number (ZunhaiSu/Super-Experts-Profilling, eval_utils.py; absolute values, where
    REAP's copy takes signed ones).
    """
    early = {n: a for n, a in largest.items() if n < round(DEPTH * layers)}
    if not early:
        return ()
    peaks = sorted(
        chain.from_iterable(_peaks(n, a) for n, a in early.items()),
        key=lambda p: (-p.output, p.layer, p.expert),
    )
    every = [p.output for p in peaks]
    limit = max(float(np.percentile(every, PERCENTILE)), SHARE * every[0])
    forming = forming_massive(streams) | (set(early) - set(streams))
    chosen = [p for p in peaks if p.output > limit and p.layer in forming]
    shown = chosen or peaks[:1]
    rest = max((p.output for p in peaks if p not in shown), default=0.0)
    return tuple(replace(p, times=p.output / max(rest, 1e-30), super=bool(chosen)) for p in shown)


def _peaks(layer: int, largest: np.ndarray) -> list[Peak]:
    return [Peak(layer, expert, float(output)) for expert, output in enumerate(largest)]


def forming_massive(streams: Mapping[int, np.ndarray]) -> set[int]:
    """The layers that make massive activations: they leave a number that is enormous beside the
    rest of its token's state, and larger than what the MoE layer below left.
    """
    forming, below = set(), 0.0
    for number in sorted(streams):
        largest, median = map(float, streams[number])
        if largest >= MASSIVE * median and largest >= RAISED * below:
            forming.add(number)
        below = largest
    return forming


def by_layer(peaks: Iterable[Peak]) -> dict[int, list[int]]:
    """{layer: experts} of the super ones."""
    layers: dict[int, list[int]] = {}
    for peak in sorted(peaks, key=lambda p: (p.layer, p.expert)):
        if peak.super:
            layers.setdefault(peak.layer, []).append(peak.expert)
    return layers
