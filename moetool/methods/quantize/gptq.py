"""GPTQ: the error of each weight is made good by those that are not rounded yet."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.field import FINE
from moetool.methods.options import option
from moetool.methods.quantize import grids
from moetool.methods.quantize.way import Rounding, ToRound

if TYPE_CHECKING:
    from moetool.methods.contract import Decisions


@dataclass(frozen=True)
class Compensating:
    """The options of gptq."""

    damping: float = option(
        0.0,
        "what is added to the diagonal of a Hessian, in units of its mean (0: 0.03 to 0.3, more "
        "where fewer tokens came)",
        FINE,
    )
    hessian: str = option(
        "own",
        "what an expert's tokens count: own, each alike; gate or gate2, by their gate weight or its "
        "square (MoEQuant, arXiv 2505.03804; no gain was measured)",
        FINE,
        choices=("own", "gate", "gate2"),
    )


class Gptq(Rounding):
    """GPTQ (arXiv 2210.17323), layer after layer on the layers below as they will be written: each
    expert by the tokens that come to it; scales are searched, weighted by the Hessian's diagonal.
    """

    name: ClassVar[str] = "gptq"
    text: ClassVar[bool] = True
    Options = Compensating
    own: Compensating

    @property
    def rounding(self) -> JsonObject:
        """What lies outside of the layers is rounded as rtn does."""
        return {"search": "mse"}

    def decide(self, job: ToRound) -> Decisions:
        """Every matrix of the layers, solved. UsageError where there is no text, or no grid."""
        from moetool.methods.contract import Decisions

        if not self.verb.calibrate:
            stats = bool(self.verb.stats)
            raise UsageError(
                "gptq sends text through the model, layer after layer",
                expected="--calibrate FILE",
                found="--stats: a profile does not hold what each matrix sees"
                if stats
                else "no text",
                hint="--calibrate FILE, or --method rtn",
            )
        if len(lost := list(grids.without(job.choice))) == len(job.choice.formats):
            said = grids.unsolvable(job.choice.formats[name] for name in lost)
            if self.verb.method != "auto":
                raise UsageError(said, file=job.source.folder, hint="use --method rtn")
            return Decisions(report={"warnings": [f"{said}: rounded as --method rtn does"]})
        from moetool.methods.quantize.parts import solving

        return solving.decisions(job, self.verb, asdict(self.own))
