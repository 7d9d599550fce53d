"""An FFN with groups of experts in its place, under it or beside it.

The block is the family's own module: its class becomes one derived from the stock class, its
linears stay its children (so names on disk stay), and routers and experts are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from moetool.modeling.balance import Scores

if TYPE_CHECKING:
    from moetool.modeling.laws.law import Choices, CombineLaw
    from moetool.surgery.groups import Group

Tensor = torch.Tensor
Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FfnLinears:
    """The linears of an FFN by their names in its module. `into`: those that see its input; `out`:
    the one that gives its output; `shapes`: (out, in) of each; `biased`: those with a bias;
    `transposed`: whether weights lie as [in, out].
    """

    into: tuple[str, ...]
    out: str
    shapes: Mapping[str, tuple[int, int]]
    biased: frozenset[str]
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.into, self.out)

    @property
    def hidden(self) -> int:
        """Width of a token."""
        return self.shapes[self.into[0]][1]


class RowsOf(NamedTuple):
    """The rows of one expert: from `first` up to `last`, which is the next one's."""

    expert: int
    first: int
    last: int


@dataclass(frozen=True)
class Picked:
    """Tokens in the order of the experts they go to. `token`: which token each row is [rows];
    `weight`: of each row [rows, 1], None where all are 1; `runs`: of the experts that have
    tokens; `tokens`: how many there are; `single`: whether each
    token is one row; `sums`: whether the weights of a token sum to one.
    """

    token: Tensor
    weight: Tensor | None
    runs: tuple[RowsOf, ...]
    tokens: int
    single: bool
    sums: bool

    @classmethod
    def of(cls, chosen: Choices, choices: int, sums: bool = False) -> Picked:
        """Sort them."""
        tokens, k = chosen.expert.shape
        flat = chosen.expert.flatten()
        order = flat.argsort(stable=True)
        weight = None if chosen.weight is None else chosen.weight.flatten()[order, None]
        counts = torch.bincount(flat, minlength=choices).tolist()
        token = order // k if k > 1 else order
        return cls(token, weight, _runs(counts), tokens, k == 1, sums)

    def weighted(self, rows: Tensor) -> Tensor:
        """Rows [rows, width] times their weights."""
        return rows if self.weight is None else rows * self.weight

    def back(self, rows: Tensor) -> Tensor:
        """Sums of each token's rows [tokens, width]."""
        zeros = rows.new_zeros(self.tokens, rows.shape[-1])
        return zeros.index_add(0, self.token, rows)

    def shares(self) -> Tensor:
        """The sum of the weights of each token [tokens, 1]."""
        ones = torch.ones(len(self.token), 1, device=self.token.device)
        return self.back(ones if self.weight is None else self.weight)


def _runs(counts: list[int]) -> tuple[RowsOf, ...]:
    runs, first = [], 0
    for expert, count in enumerate(counts):
        if count:
            runs.append(RowsOf(expert, first, first + count))
        first += count
    return tuple(runs)


class GroupedBlock(nn.Module):
    """What a stock FFN module becomes. `held`: each group and the law of its route; `linears`: of
    the FFN; `seen`: a list where router scores of this pass are wanted, else None.
    """

    stock: type[Any]
    linears: FfnLinears
    held: tuple[tuple[Group, CombineLaw], ...]
    seen: list[Scores] | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        made: Tensor | None = None
        if any(group.base == "beside" for group, _ in self.held):
            made = self.ffn(x)
        for group, law in self.held:
            more = self._one(group, law, x)
            made = more if made is None else made + more
        assert made is not None
        return made.view(hidden_states.shape)

    def _one(self, group: Group, law: CombineLaw, x: Tensor) -> Tensor:
        """What one group gives."""
        scores = getattr(self, group.router)(x)
        chosen = law.choose(scores)
        if self.seen is not None:
            self.seen.append(Scores(scores, chosen.expert))
        picked = Picked.of(chosen, scores.shape[-1], law.sums)
        made: Tensor = getattr(self, group.name).run(self, x, picked)
        return made if group.scale == 1.0 else made * group.scale

    def ffn(self, x: Tensor, linears: Mapping[str, Linear] | None = None) -> Tensor:
        """The family's own FFN of x [tokens, hidden], with these linears for its own."""
        made: Tensor = self.stock.forward(_Seen(self, linears) if linears else self, x)
        return made


class _Seen:
    """A module as its forward sees it, with other linears."""

    def __init__(self, module: nn.Module, linears: Mapping[str, Linear]) -> None:
        self.__dict__.update(linears)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


_MADE: dict[type[Any], type[GroupedBlock]] = {}


def grown(stock: type[Any]) -> type[GroupedBlock]:
    """The class of a block over a stock class: MoeLlamaMLP of LlamaMLP."""
    if stock not in _MADE:
        said = {"stock": stock, "__module__": __name__, "__doc__": GroupedBlock.__doc__}
        _MADE[stock] = type(f"Moe{stock.__name__}", (GroupedBlock, stock), said)
    return _MADE[stock]


def blocks(model: nn.Module) -> Iterator[GroupedBlock]:
    """Those of a model, in order."""
    return (m for m in model.modules() if isinstance(m, GroupedBlock))
