"""What every key of a route answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.errors import MoetoolError
from moetool.modeling.laws.law import Choices
from moetool.modeling.piece import GrownPart
from moetool.modeling.signals import Heard
from moetool.surgery.groups import Group
from moetool.surgery.route import LAWS

_STD = 0.02


class Scorer(GrownPart):
    """Subclass it in a file of this folder, with a `name`; built with the group whose experts it
    scores and the width of a token. Its parameters are the tensors that surgery/route.py names.
    `reads`: the signals that it looks at (modeling/signals.py); `sites`: where alone it can be;
    `after`: whether it looks at what comes out of the module.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    sites: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[bool] = False

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__()
        self.choices = group.choices - LAWS[group.route.law].rest
        self._starts = {tensor.name: tensor.start for tensor in group.router_tensors}
        for tensor in group.router_tensors:
            held = nn.Parameter(torch.empty(tensor.sides(hidden)))
            self.register_parameter(tensor.name, held)
        self._sound = False

    def reset(self) -> None:
        from transformers import initialization as init

        for name, held in self.named_parameters():
            if self._starts[name] == "zero":
                init.zeros_(held)
            else:
                init.normal_(held, std=_STD)

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        """x [tokens, hidden], and what the call says beside it -> scores [tokens, choices]; -inf
        for choices that a token may not use.
        """
        raise NotImplementedError

    @property
    def learns(self) -> bool:
        """Whether something can be trained to choose more evenly: what the balance loss counts."""
        return bool(self._parameters)

    def fixed(self, heard: Heard, x: Tensor) -> Choices | None:
        """Who works on x [tokens, hidden] whatever the scores; None: the law says it."""
        return None

    def stands(self, place: int) -> None:
        """Told where one router scores for all modules of a group: which of them this one is in,
        from 0; only the first holds the tensors.
        """

    def among(self, modules: int) -> None:
        """Told, of the first of them, how many there are. MoetoolError where it scores for others."""

    def held(self, name: str) -> Tensor | None:
        """One of its tensors, None where this router has it not."""
        return self._parameters.get(name)

    def likely(self, x: Tensor) -> Tensor | None:
        """x [tokens, hidden] -> the score by which each token alone foresees that an expert takes
        it [tokens, choices]: what a law that looks at all tokens is to be learned by (MoMa, arXiv
        2407.21770). None where the router has no such part.
        """
        into, out = self.held("auxiliary_in"), self.held("auxiliary_out")
        if into is None or out is None:
            return None
        middle = functional.silu(functional.linear(x.detach(), into))
        return functional.linear(middle, out)

    def groups(self, heard: Heard, tokens: int) -> Tensor | None:
        """Which balance each token counts in [tokens]; None: all in one."""
        return None

    def check(self) -> None:
        """Once, when it first runs: a router of NaN picks any expert without a word."""
        if not self._sound:
            for name in self._unsound():
                raise MoetoolError(
                    "a router that holds no numbers",
                    tensor=f"router.{name}",
                    expected="finite numbers",
                    found="NaN or inf",
                    hint="`moetool verify` says whether the file is as it was written",
                )
            self._sound = True

    def _unsound(self) -> Iterator[str]:
        for name, held in self.named_parameters():
            if not held.is_meta and not bool(torch.isfinite(held.detach()).all()):
                yield name
