"""How the members of a cluster become one expert: what the merge operation of a plan is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetool.data import JsonObject

if TYPE_CHECKING:
    from moetool.methods.merge.options import Merging


@dataclass(frozen=True)
class Combine:
    """`how`: the rule of kernels/merge.py; `parameters`: its parameter -> the option that sets it.
    refits: down matrices are solved afterwards; whitens: it can work on whitened inputs.
    """

    how: str
    parameters: Mapping[str, str]
    refits: bool = False
    whitens: bool = False

    def told(self, options: Merging) -> JsonObject:
        """The operation's parameters."""
        return {"how": self.how} | {k: getattr(options, v) for k, v in self.parameters.items()}


COMBINE = {
    "mean": Combine("mean", {}),
    "svd": Combine("svd", {"energy": "rank_energy"}, whitens=True),
    "least-squares": Combine("mean", {}, refits=True),
    "ties": Combine("ties", {"density": "density"}),
}
