"""What the experts of a group share, and how those run that are FFNs of their own."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moetool.data import JsonObject
from moetool.modeling.block import FfnLinears, GroupedBlock, Linear, Picked
from moetool.modeling.piece import GrownPart
from moetool.surgery import strict
from moetool.surgery.groups import Group
from moetool.surgery.strict import Kinds


class Expert(GrownPart):
    """One expert: a child for each linear of the FFN that it has, under the linear's name, and
    `output_scale` [1] where the group's params ask for one.
    """

    def __init__(self, parts: Iterable[tuple[str, nn.Module]], params: JsonObject) -> None:
        super().__init__()
        for name, part in parts:
            self.add_module(name, part)
        scale = torch.empty(1, dtype=torch.float32) if params.get("output_scale") else None
        self.output_scale = None if scale is None else nn.Parameter(scale)

    def reset(self) -> None:
        from transformers import initialization as init

        if self.output_scale is not None:
            init.ones_(self.output_scale)

    def forward(self, made: Tensor) -> Tensor:
        """What its FFN gave [rows, hidden], scaled."""
        return made if self.output_scale is None else made * self.output_scale.to(made.dtype)


class ExpertGroup(nn.ModuleList):
    """Subclass it in a file of this folder, with a `name`, and say what a linear of an expert is
    (`part`), or how all run. `bases`: what a group of this form may stand on; `sites`: where alone
    it can be; `needs` and `knows`: the keys that its params must and may have, each with its kind
    or its values; `idle`: whether they run where no token has one, as the FFN is a part of what
    they give.
    """

    name: ClassVar[str] = ""
    sites: ClassVar[tuple[str, ...]] = ()
    bases: ClassVar[tuple[str, ...]] = ("beside", "member", "gone")
    needs: ClassVar[Kinds] = {}
    knows: ClassVar[Kinds] = {"output_scale": bool}
    idle: bool = False

    def __init__(self, group: Group, linears: FfnLinears) -> None:
        strict.check(group.params, self.needs, self.knows, f"params of {group.form} experts")
        self.first = int(group.base == "member")  # the number that the first expert has in a route
        super().__init__(self.one(group, linears) for _ in range(group.experts))

    def one(self, group: Group, linears: FfnLinears) -> GrownPart:
        """An expert."""
        return Expert(
            ((name, self.part(group.params, linears, name)) for name in linears.names),
            group.params,
        )

    def part(self, params: JsonObject, linears: FfnLinears, name: str) -> nn.Module:
        """One linear of one expert."""
        raise NotImplementedError

    def mixed(self, block: GroupedBlock, x: Tensor, picked: Picked, scale: float) -> Tensor:
        """What the group gives [tokens, hidden]: the sum of `run` times the group's factor, zero
        for tokens that nobody works on.
        """
        if not picked.runs and not self.idle:  # nobody
            return torch.zeros_like(x)
        made = self.run(block, x, picked)
        return made if scale == 1.0 else made * scale

    def run(self, block: GroupedBlock, x: Tensor, picked: Picked) -> Tensor:
        """[tokens, hidden] -> the weighted sum of what each token's experts give."""
        made = picked.each(picked.rows(x), partial(self.of, block))
        return picked.back(picked.weighted(made))

    def of(self, block: GroupedBlock, choice: int, rows: Tensor) -> Tensor:
        """What the expert behind a choice gives for its rows; of a `member` group the first choice
        is the FFN itself.
        """
        if choice < self.first:
            return block.own_ffn(rows)
        expert = self[choice - self.first]
        made: Tensor = expert(block.own_ffn(rows, self.swapped(block, expert)))
        return made

    def swapped(self, block: GroupedBlock, expert: nn.Module) -> dict[str, Linear]:
        """What of the block's FFN an expert replaces, by name: linears, for most."""
        return dict(expert.named_children())

    def hold_masters(self, block: GroupedBlock) -> bool:
        """Train rounded weights through weights in full, from here on; whether it has any."""
        return False

    def dense(self, block: GroupedBlock, expert: int) -> dict[str, Tensor]:
        """The weights [out, in] of an FFN in full that computes what this expert does, by linear."""
        raise NotImplementedError


def dense_of(expert: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The linears of an expert in full."""
    return {name: getattr(expert, name).dense() for name in names}
