"""DIVERSIFY: how copies are made different."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.units import STRENGTH

FORMS = "none, permute, noise:SIGMA, drop:RATIO[:neuron|:reference], mask:SHARE, joined by +"


@dataclass(frozen=True)
class Diversify:
    """What happens to each expert's copy of an FFN. Ratio, sigma and masked 0 change nothing."""

    permute: bool = False
    sigma: float = 0.0
    ratio: float = 0.0
    whole_neurons: bool = True
    masked: float = 0.0

    @classmethod
    def parse(cls, spec: str) -> Diversify:
        """`permute+drop:0.5` -> Diversify; UsageError for anything else."""
        values: JsonObject = {}
        for part in spec.split("+"):
            if part == "permute":
                values["permute"] = True
            elif (found := re.fullmatch(r"noise:(\d*\.?\d+)", part)) and float(
                found[1]
            ) <= STRENGTH:
                values["sigma"] = float(found[1])
            elif (
                found := re.fullmatch(r"drop:(\d*\.?\d+)(?::(neuron|reference))?", part)
            ) and float(found[1]) <= 1:
                values |= {"ratio": float(found[1]), "whole_neurons": found[2] != "reference"}
            elif (found := re.fullmatch(r"mask:(\d*\.?\d+)", part)) and float(found[1]) < 1:
                values["masked"] = float(found[1])
            elif part != "none":
                raise UsageError(
                    f"--diversify {spec!r} is not understood",
                    expected=FORMS,
                    hint="for example --diversify drop:0.5",
                )
        return cls(**values)

    @property
    def changes_function(self) -> bool:
        """Permuting neurons does not; noise, re-drawing and masking do."""
        return self.sigma > 0 or self.ratio > 0 or self.masked > 0

    def params(self, layer: int, matrix: str, seed: int) -> JsonObject:
        """Options of the `neurons` operation for one matrix (gate, up or down) of one layer; empty
        when nothing happens.
        """
        out: JsonObject = {}
        if self.permute:
            out["permute"] = f"layer{layer}"
        if self.ratio > 0:
            out["redraw"] = {
                "ratio": self.ratio,
                "same": f"layer{layer}" if self.whole_neurons else None,
            }
        if self.sigma > 0:
            out["noise"] = {"sigma": self.sigma}
        if self.masked > 0:
            out["mask"] = {"share": self.masked}
        return out | {"seed": seed, "name": f"layer{layer}/{matrix}"} if out else {}
