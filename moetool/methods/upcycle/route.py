"""ROUTE: how the router starts. Its law is the target family's own."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.units import STRENGTH

FORMS = "zero, normal:SIGMA, kaiming, uniform:SIGMA (centred), or group:SIGMA (equal rows in each group of --split)"
DEFAULT_SIGMA = 0.02


@dataclass(frozen=True)
class Router:
    """The first value of a router matrix [experts, hidden]. `repeat` G: each row stands G times
    (virtual groups).
    """

    law: str
    sigma: float = 0.0
    repeat: int = 1

    @classmethod
    def parse(cls, spec: str, split: int, top_k: int, experts: int = 0) -> Router:
        """The router of a spec; `auto` is group-equal rows where whole groups are selected,
        normal:0.02 elsewhere.
        """
        whole_groups = split > 1 and top_k % split == experts % split == 0
        if spec == "auto":
            spec = f"{'group' if whole_groups else 'normal'}:{DEFAULT_SIGMA}"
        found = re.fullmatch(
            r"(zero|kaiming)|(normal|uniform|group)(?::(\d*\.?\d+(?:e-?\d+)?))?", spec
        )
        sigma = float(found[3]) if found and found[3] else DEFAULT_SIGMA
        if not found or sigma > STRENGTH:
            raise UsageError(
                f"--router {spec!r} is not understood",
                expected=f"{FORMS}; SIGMA at most {STRENGTH:g}",
                hint="for example --router normal:0.02",
            )
        law = found[1] or found[2]
        if law == "zero" or (found[2] and sigma == 0):
            return cls("zero")
        if law == "group" and not whole_groups:
            raise UsageError(
                "--router group needs whole groups to be selected",
                expected=f"--split above 1, --experts and --top-k multiples of it (here --split {split} --top-k {top_k})",
                hint="use --router normal:0.02",
            )
        repeat = split if whole_groups else 1
        return cls({"group": "normal", "uniform": "centred"}.get(law, law), sigma, repeat)

    def params(self, seed: int, name: str) -> JsonObject:
        """Options of the `draw` operation."""
        return {
            "law": self.law,
            "sigma": self.sigma,
            "repeat": self.repeat,
            "seed": seed,
            "name": name,
        }
