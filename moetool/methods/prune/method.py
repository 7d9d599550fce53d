"""moetool prune: a mixture of experts with fewer experts."""

from __future__ import annotations

from dataclasses import dataclass

from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.prune.way import PruneWay
from moetool.methods.reduce.options import Reducing
from moetool.methods.reduce.verb import Reduce
from moetool.methods.reduce.way import auto_help


@dataclass(frozen=True)
class Pruning(Reducing):
    """What prune is told."""

    method: str = option(
        "auto",
        lambda: auto_help(PruneWay.known()),
        WHAT,
        choices=lambda: ("auto", *PruneWay.known()),
    )


class Prune(Reduce):
    """Remove experts from a mixture of experts. With no text at all, what the model writes itself
    decides (--method router-distance runs nothing). Kept experts move byte for byte where they are
    not refitted.

    Everything counted with the experts goes with them: router rows, selection biases, per-expert
    scales, id tables, MTP layers. Papers and formulas stand with each way.
    """

    Options = Pruning
    Base = PruneWay
    verb = "prune"
    examples = (
        "moetool prune demo pruned --ratio 0.25",
        "moetool prune SRC OUT --ratio 25% --calibrate text.jsonl",
        "moetool prune SRC OUT --calibrate text.jsonl --no-refit --max-kl 0.05",
    )
