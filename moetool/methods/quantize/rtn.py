"""Round to nearest: no text, every matrix by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.methods.field import FINE
from moetool.methods.options import option
from moetool.methods.quantize import grids
from moetool.methods.quantize.way import Rounding, ToRound

if TYPE_CHECKING:
    from moetool.methods.contract import Decisions


@dataclass(frozen=True)
class Searching:
    """The options of rtn."""

    search: str = option(
        "mse",
        "how a scale is found: mse (least squared error, over shrink factors and the scale's sign) "
        "or none (the largest value's, in the weight's dtype, as the libraries do)",
        FINE,
        choices=("mse", "none"),
    )


class Rtn(Rounding):
    """Round every weight to the nearest level; needs no text."""

    name: ClassVar[str] = "rtn"
    Options = Searching
    own: Searching

    @property
    def rounding(self) -> JsonObject:
        return {} if self.own.search == "none" else {"search": self.own.search}

    def decide(self, job: ToRound) -> Decisions:
        """Says why text, which auto takes to gptq, was not solved on."""
        from moetool.methods.contract import Decisions

        if self.verb.method != "auto" or not self.verb.has_text:
            return Decisions()
        said = grids.unsolvable(job.choice.formats.values())
        return Decisions(report={"warnings": [f"{said}: the text only measures"]})
