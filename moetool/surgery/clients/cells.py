"""One judgement of the data: what a client does, whether that was run or read, and why."""

from __future__ import annotations

from dataclasses import dataclass

STATES = ("works", "refuses", "wrong", "untried")
KNOWN = ("run", "source", "untried")


@dataclass(frozen=True)
class Cell:
    """`state`: works, refuses (loudly), wrong (silently) or untried; a reason is needed wherever it
    does not work. `known`: whether somebody ran it or read it in the source of `version`;
    `through`: what makes a client read this all the same.
    """

    state: str
    known: str
    why: str = ""
    version: str = ""
    through: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES or self.known not in KNOWN:
            raise TypeError(f"{self.state}, {self.known}: not of {STATES} and {KNOWN}")
        if (self.state == "works") == bool(self.why):
            raise TypeError(f"{self.state} with the reason {self.why!r}")


@dataclass(frozen=True)
class Verdict:
    """What a client makes of something, the client's own version filled in."""

    state: str
    why: str
    version: str
    known: str
    through: str = ""

    @property
    def works(self) -> bool:
        return self.state == "works"
