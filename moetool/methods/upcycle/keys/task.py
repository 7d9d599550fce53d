"""The task of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.keys.masked import Masked, MaskedKey, choosing, table


@dataclass(frozen=True)
class Tasks(Masked):
    """The options of the key."""

    tasks: int = option(0, "how many tasks there are; 0: one for each expert", minimum=0)


class TaskKey(MaskedKey):
    """The task of a sequence: a number that the caller gives to forward, `task=[batch]`; each task
    has an expert of its own, or what --allowed says. DMoERM (arXiv 2403.01197).
    """

    name = "task"
    Options: ClassVar[type] = Tasks
    own: Tasks
    keeps = False
    sites = ("ffn", "attention")  # others need their own module as the first choice
    apart = False

    def check(self, ground: Ground, choices: int, top_k: int) -> None:
        self.options(ground, choices, top_k)

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        kinds = self.own.tasks or (self.own.allowed.count("/") + 1 if self.own.allowed else choices)
        usual = "/".join(
            "".join(str(int(task % choices == one)) for one in range(choices))
            for task in range(kinds)
        )
        return choosing(self.own, table(self.own.allowed, usual, kinds, choices, top_k), top_k)
