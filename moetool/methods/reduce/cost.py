"""What deciding costs, in arithmetic: from shapes and tokens alone, before any of it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moetool.surgery.experts import Mixture

SWEEPS = 5  # kernels/solve.py, which this file must not import: it imports torch
DOUBLE = 2  # an operation in float64 takes as long as so many in float32


class Operations(NamedTuple):
    """Operations of solving a layer's down matrices: products in float32, factors in float64, and
    solving with those.
    """

    products: float
    factors: float
    solves: float

    @property
    def all(self) -> float:
        """In units of float32's."""
        return self.products + DOUBLE * self.factors + self.solves


@dataclass(frozen=True)
class LayerSizes:
    """A layer: what its tokens go through beside experts (elements), its experts as gate, up and
    down of [width, hidden], how many run for a token and how many there are when it is solved.
    """

    beside: float
    hidden: int
    width: int
    top_k: int
    kept: int

    def walk(self, tokens: int) -> float:
        """Operations of sending tokens through it (attention's scores, which are few, aside)."""
        experts = 3 * self.top_k * self.hidden * self.width
        return 2.0 * tokens * (self.beside + experts)

    def solving(self, tokens: int) -> Operations:
        """Operations of kernels/solve.py's refit, with every token on experts that stay."""
        seen = float(tokens * min(self.top_k, self.kept))
        hidden, width = self.hidden, self.width
        outputs = 2 * seen * 3 * hidden * width  # of all experts once, to know what is left
        grams = 2 * seen * width * width
        sweeps = SWEEPS * 4 * seen * width * hidden
        factors = self.kept * width**3 / 3
        return Operations(
            outputs + grams + sweeps, factors, SWEEPS * 2 * self.kept * width**2 * hidden
        )


def times(mixture: Mixture, kept: int, tokens: int, solved_on: int) -> float:
    """The work of a refit on `solved_on` tokens, its own walk included, in units of the walk that
    decides on `tokens`.
    """
    sizes = of(mixture, kept)
    count = mixture.text_model.field("layers") or len(mixture.layers)
    share = len(mixture.layers) / count  # other layers are walked through alone
    refit = sizes.walk(solved_on) + share * sizes.solving(solved_on).all
    return refit / max(1.0, sizes.walk(tokens))


def of(mixture: Mixture, kept: int) -> LayerSizes:
    """The sizes of a model's layers, those without experts as others are beside theirs."""
    at, first = mixture.text_model, mixture.layers[0]
    experts = {n for n, c in mixture.counted.items() if c.kind == "expert"}
    beside = 0
    for name, stored in mixture.source.tensors.items():
        if name not in experts and at.layer_of(name) is not None:
            beside += stored.elements
    layers = int(at.field("layers") or len(mixture.layers))
    hidden = int(at.field("hidden") or 1)
    return LayerSizes(beside / layers, hidden, mixture.width(first), mixture.top_k, kept)
