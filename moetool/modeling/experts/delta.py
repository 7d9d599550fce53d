"""Experts under the FFN that are its linears with something added: y_e = W x + D_e x, W shared by
all. W is multiplied with once, whatever the number of experts: of the input before they differ, and
of the weighted sum of what they give the last linear, which is linear.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from moetool.errors import MoetoolError
from moetool.modeling.block import FfnLinears, GroupedBlock, Linear, Picked
from moetool.modeling.experts.group import Expert, ExpertGroup
from moetool.modeling.piece import GrownPart
from moetool.surgery.groups import Group


class AddedLinear(GrownPart):
    """What an expert adds to one linear. Subclass it."""

    def forward(self, x: Tensor, base: Tensor | None = None, over: bool = False) -> Tensor:
        """The change for rows x [rows, in], added to `base` [rows, out] if given: in place, where
        `over` allows it.
        """
        raise NotImplementedError

    def dense(self, weight: Tensor) -> Tensor:
        """W [out, in] with the change."""
        raise NotImplementedError


def onto(base: Tensor | None, made: Tensor, over: bool) -> Tensor:
    """A change [rows, out] added to `base`, as `AddedLinear` is asked for it."""
    if base is None:
        return made
    return base.add_(made) if over else base + made


class DeltaExperts(ExpertGroup):
    """Subclass it in a file of this folder and say with `adding` what a linear of a shape (out, in)
    gets.
    """

    bases: ClassVar[tuple[str, ...]] = ("under",)

    def __init__(self, group: Group, linears: FfnLinears) -> None:
        super().__init__(group, linears)
        self.idle = group.params.get("mix") == "linears"

    @classmethod
    def adding(cls, group: Group) -> Callable[[tuple[int, int]], AddedLinear]:
        """Makes what one linear of one expert has, of the linear's shape."""
        raise NotImplementedError

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        made = self.adding(group)
        targets = group.params.get("targets", linears.names)
        if not targets or not set(targets) <= set(linears.names):
            raise MoetoolError(
                f"`targets` of {group.form} experts",
                file="config.json",
                expected=f"some of {', '.join(linears.names)}",
                found=str(targets)[:200],
                hint="restore the config.json that came with the model",
            )
        return Expert(((n, made(linears.shapes[n])) for n in targets), {})

    def run(self, block: GroupedBlock, x: Tensor, picked: Picked) -> Tensor:
        if self.idle:
            own = {n: partial(self._inside, block, n, picked) for n in self[0]._modules}
            return block.own_ffn(x, own)
        return (self._once if picked.k == 1 else self._several)(block, x, picked)

    def _inside(self, block: GroupedBlock, name: str, picked: Picked, x: Tensor) -> Tensor:
        """W x and the weighted sum of what a token's experts add to it [tokens, out]."""
        made: Tensor = getattr(block, name)(x)
        if not picked.runs:
            return made
        rows = picked.each(picked.rows(x), lambda e, mine: self[e].get_submodule(name)(mine))
        return made + picked.back(picked.weighted(rows))

    def _once(self, block: GroupedBlock, x: Tensor, picked: Picked) -> Tensor:
        """Every token has one expert: all rows together, sorted by it."""
        lie, rows = block.linears, picked.rows(x)
        into: dict[str, Linear] = {}
        for name in lie.into:
            into[name] = _given(self._changed(name, rows, getattr(block, name)(rows), picked))
        middle = picked.weighted(block.own_ffn(rows, into | {lie.out: _itself}))
        made = _last(block, middle, None if picked.sums else picked.weight)
        return picked.back(self._changed(lie.out, middle, made, picked))

    def _changed(self, name: str, rows: Tensor, base: Tensor, picked: Picked) -> Tensor:
        """`base` [rows, out] with each expert's change of its own rows."""
        if name not in self[0]._modules:
            return base
        over = _may_overwrite(rows)
        if len(picked.runs) == 1:  # a single token, mostly
            alone: Tensor = self[picked.runs[0].expert].get_submodule(name)(rows, base, over)
            return alone
        made = [self[e].get_submodule(name)(rows[a:b], base[a:b], over) for e, a, b in picked.runs]
        return base if over else torch.cat(made)

    def _several(self, block: GroupedBlock, x: Tensor, picked: Picked) -> Tensor:
        """One expert after the other: what it makes is still near when it is added up."""
        lie, own = block.linears, self[0]._modules
        base = {name: getattr(block, name)(x) for name in lie.into}
        over = _may_overwrite(x) and picked.token is not None
        mixed: Tensor | None = None
        change: Tensor | None = None
        for run in picked.runs:
            rows, expert = picked.take(x, run), self[run.expert]
            into: dict[str, Linear] = {lie.out: _itself}
            for name, every in base.items():
                made = picked.take(every, run)
                part = expert.get_submodule(name) if name in own else None
                into[name] = _given(made if part is None else part(rows, made, over))
            middle = picked.weighted(block.own_ffn(rows, into), run)
            mixed = picked.add(mixed, middle, run)
            if lie.out in own:
                change = picked.add(change, expert.get_submodule(lie.out)(middle), run)
        assert mixed is not None
        made = _last(block, mixed, None if picked.sums else picked.shares(x))
        return made if change is None else made + change

    def dense(self, block: GroupedBlock, expert: int) -> dict[str, Tensor]:
        made = {}
        for name in block.linears.names:
            held = getattr(block, name).weight
            weight = held.T if block.linears.transposed else held
            part = self[expert]._modules.get(name)
            made[name] = part.dense(weight) if isinstance(part, AddedLinear) else weight
        return made


def _last(block: GroupedBlock, mixed: Tensor, shares: Tensor | None) -> Tensor:
    """The last linear of weighted sums; its bias counts as often as their weights say [rows, 1]."""
    last = getattr(block, block.linears.out)
    made: Tensor = last(mixed)
    if shares is not None and block.linears.out in block.linears.biased:
        made = made + (shares - 1) * last(torch.zeros_like(mixed[:1]))
    return made


def _may_overwrite(x: Tensor) -> bool:
    """Whether what nobody else holds may be changed in place: it saves a pass through memory."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))


def _given(made: Tensor) -> Linear:
    """A linear that was computed before."""
    return lambda _: made


def _itself(x: Tensor) -> Tensor:
    return x
