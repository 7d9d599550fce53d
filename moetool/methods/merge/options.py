"""What merge is told beside what prune is told as well: its parts, each with `auto` for the way's
own choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from moetool.errors import UsageError
from moetool.methods.field import FINE, WHAT
from moetool.methods.options import option
from moetool.methods.reduce.options import Reducing
from moetool.surgery import forms
from moetool.surgery.reform import FORMS

FEATURES = {
    "outputs": "outputs on the sample",
    "cosine": "outputs of unit length",
    "mean-outputs": "mean outputs",
    "router": "router rows",
    "router-logits": "router logits of unit length",
    "outputs-and-logits": "both",
    "weights": "all weights",
    "svd": "coefficients in a low-rank basis of the layer's experts, neurons matched",
}
CLUSTER = ("kmeans", "average", "complete", "ward", "dominant", "ream")
WEIGH = ("frequency", "saliency", "uniform")
ALIGN = ("none", "weights", "activations")
ROUTER = ("centroid", "mean", "logsumexp")
YES = (("true", "yes"), ("false", "no"))  # words of before


def _forms() -> tuple[str, ...]:
    """Those that every way can write, and those that need all experts of a layer at once."""
    return (*FORMS, *(name for name, form in forms.forms().items() if not form.alone))


def _auto(*kinds: str) -> tuple[str, ...]:
    return ("auto", *kinds)


@dataclass(frozen=True)
class Merging(Reducing):
    """The parts of a merge. A published way chooses them all; each can be chosen alone."""

    features: str = option("auto", "what experts are compared by", WHAT, choices=_auto(*FEATURES))
    cluster: str = option("auto", "how they are put together", WHAT, choices=_auto(*CLUSTER))
    joint: str = option("auto", "layers clustered at once", FINE, choices=_auto("1", "2"))
    weigh: str = option("auto", "what weighs a cluster's members", WHAT, choices=_auto(*WEIGH))
    align: str = option("auto", "neurons matched before averaging", WHAT, choices=_auto(*ALIGN))
    combine: str = option("auto", "", WHAT)  # some belong to a way: merge/method.py
    router: str = option(
        "auto",
        "a cluster's router row: centroid (its lead's), mean, logsumexp (where the bias is part of the logits)",
        WHAT,
        choices=_auto(*ROUTER),
    )
    rank_energy: float = option(
        0.95,
        "share of the squared singular values that svd keeps, of features or of a merge; 1 keeps all",
        FINE,
        unit="share",
    )
    whiten: str = option(
        "auto",
        "svd in the space of whitened inputs",
        FINE,
        choices=_auto("yes", "no"),
        old=YES,
    )
    form: str = option(
        "auto",
        "how matrices are stored: auto (as in SRC where they are only moved; full where anything "
        "is computed), same (as in SRC; what is computed is rounded again), full, or as one "
        "method alone can store them (factored: a base and differences)",
        WHAT,
        choices=_forms,
        old=(("materialised", "full"),),
    )
    density: float = option(0.2, "share of differences that ties keeps", FINE, unit="share")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.rank_energy <= 1.0 or not 0.0 < self.density <= 1.0:
            raise UsageError(
                "--rank-energy and --density lie above 0 and at most at 1",
                found=f"{self.rank_energy:g}, {self.density:g}",
                hint="for example --rank-energy 0.95",
            )
