"""What a whole pass of the model before saw: its last hidden states, through one classifier for all
modules of a group (X-LoRA, arXiv 2402.07148).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moetool.errors import MoetoolError, UsageError
from moetool.modeling.laws.law import Choices
from moetool.modeling.routes.scorer import Scorer
from moetool.modeling.signals import BEFORE, Heard
from moetool.surgery.groups import Group
from moetool.surgery.route import TWOPASS


class TwopassScorer(Scorer):
    """options of the route: width and middle, of the classifier's hidden layers and how many there
    are beyond the first; modules, how many modules have scores of their own (else all the same
    ones); before, the weight of each expert in the pass before (else none works there).

    The first module of the group holds the classifier; the others see its scores.
    """

    name: ClassVar[str] = TWOPASS
    sites: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = (BEFORE,)
    weight: Tensor

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        said = group.route.options
        self.modules_apart, self.before = said.get("modules", 0), float(said.get("before", 0.0))
        self.place, self.title = 0, f"{BEFORE} of {group.name}"

    def stands(self, place: int) -> None:
        self.place = place
        for name in [*self._parameters] if place else ():
            delattr(self, name)

    def among(self, modules: int) -> None:
        if self.modules_apart not in (0, modules):
            raise MoetoolError(
                "a router that scores for other modules than there are",
                file="config.json",
                expected=f"`modules` {modules} of a route by {self.name}",
                found=self.modules_apart,
                hint="restore the config.json that came with the model",
            )

    @property
    def holds(self) -> bool:
        """Whether it is the one with the classifier."""
        return not self.place

    def scores(self, seen: Tensor) -> Tensor:
        """seen [tokens, hidden], of the pass before -> [tokens, modules, choices], with one module
        where all have the same.
        """
        made, into = seen, self.held("into")
        if into is not None:
            made = functional.relu(functional.linear(made, into, self.held("into_bias")))
        middle, bias = self.held("middle"), self.held("middle_bias")
        if middle is not None and bias is not None:
            for one, its in zip(middle, bias, strict=True):
                made = functional.relu(functional.linear(made, one, its))
        made = functional.linear(made, self.weight, self.held("bias"))
        return made.view(len(seen), -1, self.choices)

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        every = heard.read(self.title)
        if len(every) != len(x):
            raise UsageError(
                "a linear sees other tokens than the pass before",
                expected=f"{len(every)} tokens",
                found=f"{len(x)}",
                hint="leave linears out that see other tokens: --linears",
            )
        return every[:, self.place if self.modules_apart else 0].to(x.device)

    def fixed(self, heard: Heard, x: Tensor) -> Choices | None:
        if not heard.before:
            return None
        if not self.before:
            nobody = torch.full((len(x), 1), -1, device=x.device)
            return Choices(nobody, None, drops=True)
        every = torch.arange(self.choices, device=x.device).expand(len(x), -1)
        return Choices(every, x.new_full(every.shape, self.before))
