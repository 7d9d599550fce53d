"""What extend is told."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moetool.errors import UsageError
from moetool.methods.field import WHAT
from moetool.methods.options import Gate, Served, Storing, Text, option

AUTO = "auto"
ROUTERS = ("copy", "never")
_LIST = re.compile(r"\d{1,6}(,\d{1,6})*")


@dataclass(frozen=True)
class Copying:
    """Which experts are copied, and where."""

    copy_expert: str = option(
        AUTO,
        "the experts that are copied: auto (the most used on the text, in each layer its own), or "
        "numbers like 3 or 3,5",
        WHAT,
        metavar="auto|N,...",
    )
    layers: str = option(
        "all",
        "the MoE layers that get copies: all, auto (the half of them whose routing is the most "
        "uneven on the text; with --before, whose routing shifted most), first-half, second-half, "
        "every:N[+OFFSET], last:N, or a list like 0,2,5-7",
        WHAT,
        metavar="auto|SPEC",
    )
    copies: int = option(
        1,
        "experts that a layer gets; with --copy-expert auto the so many most used ones, one copy "
        "each",
        WHAT,
        minimum=1,
    )
    router: str = option(
        "copy",
        "how a copy is routed to: copy (its expert's row: it takes the slot of another expert) or "
        "never (its row, and a bias that is never chosen: the same function, where the router has "
        "a bias)",
        WHAT,
        choices=ROUTERS,
    )
    calibration: int = option(
        0,
        "neurons of a small network beside the router of each layer that gets copies, which "
        "corrects the weights of the chosen experts (MoExtend: 16); zero at birth, to be trained with the "
        "copies; model type moetool (0: none)",
        WHAT,
        minimum=0,
        unit="neurons",
    )
    before: str = option(
        "",
        "a profile of before (the routing on the old text, or before the routers were trained): "
        "--layers auto then takes where routing shifted most",
        WHAT,
        metavar="DIR",
        needs=("layers=auto",),
    )


@dataclass(frozen=True)
class Extending(Storing, Served, Gate, Text, Copying):
    """Everything that extend is told."""

    def __post_init__(self) -> None:
        if self.copy_expert != AUTO and not _LIST.fullmatch(self.copy_expert):
            raise UsageError(
                f"--copy-expert {self.copy_expert!r} is not understood",
                expected="auto, or numbers like 3 or 3,5",
                hint="`moetool profile` shows which experts a text uses",
            )
        self.check_one_text()
        if self.looks and not (self.calibrate or self.stats):
            told = "--copy-expert auto" if self.copy_expert == AUTO else "--layers auto"
            raise UsageError(
                f"{told} looks at text",
                expected="--stats DIR or --calibrate FILE",
                found="neither",
                hint="or say which: --copy-expert 0 --layers all",
            )
        if not self.looks and (self.calibrate or self.stats):
            raise UsageError(
                "nothing looks at the text: the experts and the layers are named",
                expected="--copy-expert auto or --layers auto",
                found=f"--copy-expert {self.copy_expert} --layers {self.layers}",
                hint="leave out --calibrate and --stats; --text FILE measures on text",
            )
        self.check_gate()

    @property
    def looks(self) -> bool:
        """Whether text decides anything."""
        return AUTO in (self.copy_expert, self.layers)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The experts that were named; none with auto."""
        return () if self.copy_expert == AUTO else tuple(map(int, self.copy_expert.split(",")))
