"""Keys that number each token or sequence, and say what each number may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.errors import UsageError
from moetool.methods.options import option
from moetool.methods.upcycle.keys.key import RouteKey


@dataclass(frozen=True)
class Masked:
    """The options of keys with a table of who may use what."""

    allowed: str = option(
        "",
        "who may use what: for each modality (text first) or task, a digit for each expert, with "
        "whole copies first one for the FFN, for example 0111/1110",
        metavar="0111/1110",
    )
    routers: str = option(
        "one",
        "where a token has a choice: one router for all, or each modality or task its own",
        choices=("one", "each"),
    )


def table(
    said: str, usual: str, kinds: int, choices: int, top_k: int, idle: bool = False
) -> list[list[int]]:
    """[kinds][choices] of 0 and 1 of --allowed, or as is usual. UsageError where it is not
    understood, or gives a kind fewer than it runs; with `idle`, but for kinds without any.
    """
    rows = (said or usual).split("/")
    wrong = [r for r in rows if len(r) != choices or set(r) - {"0", "1"}]
    used = [r for r in rows if "1" in r or not idle]
    if wrong or len(rows) != kinds or not used or any(r.count("1") < max(top_k, 1) for r in used):
        raise UsageError(
            "--allowed does not fit" if said else "the usual table has too few experts for it",
            expected=f"{kinds} rows of {choices} digits 0 or 1, at least --top-k {top_k} of them 1",
            found=said or usual,
            hint="leave out --top-k and --law: one expert a token is usual; or say who may use "
            "what, for example --experts 3 --top-k 2 --allowed 0111/1110",
        )
    return [[int(digit) for digit in row] for row in rows]


def choosing(own: Masked, rows: list[list[int]], top_k: int) -> dict[str, object]:
    """What the config says of the table: with a router where a row has a choice."""
    choice = any(sum(row) > top_k for row in rows)
    return {"allowed": rows} | ({"routers": own.routers} if choice else {})


class MaskedKey(RouteKey):
    """Whole copies stand beside the FFN as the first choice, and one expert is usual."""

    keeps = True
    sites: ClassVar[tuple[str, ...]] = ("ffn", "attention", "mixer", "norms", "final_norm")
    top_k = 1
    Options: ClassVar[type] = Masked
    own: Masked
