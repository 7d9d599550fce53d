"""A module, an FFN mostly, with groups of experts in its place, under it or beside it.

The block is the family's own module: its class becomes one derived from the stock class, its
linears stay its children (so names on disk stay), and routers and experts are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from moetool.modeling.balance import Scores
from moetool.modeling.laws.law import Beside
from moetool.modeling.signals import KEPT, OF_TEXT, Heard
from moetool.surgery.groups import MASKED

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

    @property
    def given(self) -> int:
        """Width of what it gives."""
        return self.shapes[self.out][0]


class RowsOf(NamedTuple):
    """The rows of one expert: from `first` up to `last`, which is the next one's."""

    expert: int
    first: int
    last: int


@dataclass(frozen=True)
class Picked:
    """Tokens in the order of the experts they go to. `token`: which token each row is [rows], None
    for a single token; `weight`: of each row [rows, 1], None where all are 1; `runs`: of the
    experts that have tokens; `tokens` and `k`: how many there are, and how many rows each has at
    most; `sums`: whether the weights of a token sum to one.
    """

    token: Tensor | None
    weight: Tensor | None
    runs: tuple[RowsOf, ...]
    tokens: int
    k: int
    sums: bool

    @classmethod
    def of(cls, chosen: Choices, choices: int, sums: bool = False) -> Picked:
        """Sort them; an expert of -1 is nobody."""
        (tokens, k), flat = chosen.expert.shape, chosen.expert.flatten()
        weight = None if chosen.weight is None else chosen.weight.reshape(-1, 1)
        if tokens == 1:
            if weight is not None and chosen.drops:
                weight = weight[flat >= 0]
            here = (e for e in flat.tolist() if e >= 0)
            runs = tuple(RowsOf(e, n, n + 1) for n, e in enumerate(here))
            return cls(None, weight, runs, tokens, k, sums)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat + chosen.drops, minlength=choices + chosen.drops).tolist()
        if chosen.drops:
            order = order[counts.pop(0) :]
        weight = None if weight is None else weight[order]
        return cls(order // k if k > 1 else order, weight, _runs(counts), tokens, k, sums)

    def rows(self, x: Tensor) -> Tensor:
        """Of x [tokens, width], in order."""
        if self.token is not None:
            return x[self.token]
        return x if len(self.runs) == 1 else x.expand(len(self.runs), -1)

    def take(self, x: Tensor, run: RowsOf) -> Tensor:
        """Of x [tokens, width], those of one expert."""
        return x if self.token is None else x[self.token[run.first : run.last]]

    def add(self, total: Tensor | None, rows: Tensor, run: RowsOf) -> Tensor:
        """A sum for each token [tokens, width] (None: nothing yet) with one expert's rows."""
        if self.token is None:
            return rows if total is None else total + rows
        if total is None:
            total = rows.new_zeros(self.tokens, rows.shape[-1])
        return total.index_add_(0, self.token[run.first : run.last], rows)

    def each(self, rows: Tensor, change: Callable[[int, Tensor], Tensor]) -> Tensor:
        """What `change` makes of every expert's rows, together in order."""
        made = [change(e, rows[first:last]) for e, first, last in self.runs]
        return made[0] if len(made) == 1 else torch.cat(made)

    def weighted(self, rows: Tensor, run: RowsOf | None = None) -> Tensor:
        """Rows [rows, width], all or those of one expert, times their weights."""
        if self.weight is None:
            return rows
        return rows * (self.weight if run is None else self.weight[run.first : run.last])

    def back(self, rows: Tensor) -> Tensor:
        """Sums of each token's rows [tokens, width]."""
        if self.token is None:
            return rows if len(rows) == 1 else rows.sum(0, keepdim=True)
        zeros = rows.new_zeros(self.tokens, rows.shape[-1])
        return zeros.index_add(0, self.token, rows)

    def dense(self, choices: int, like: Tensor) -> Tensor:
        """The weight of each expert for each token [tokens, choices], in the dtype of `like`."""
        made = like.new_zeros(self.tokens, choices)
        for run in self.runs:
            rows = slice(run.first, run.last)
            weight = 1.0 if self.weight is None else self.weight[rows, 0].to(made.dtype)
            made[0 if self.token is None else self.token[rows], run.expert] = weight
        return made

    def shares(self, like: Tensor) -> Tensor:
        """The sum of the weights of each token [tokens, 1]."""
        rows = self.runs[-1].last if self.runs else 0
        return self.back(like.new_ones(rows, 1) if self.weight is None else self.weight)


def _runs(counts: list[int]) -> tuple[RowsOf, ...]:
    runs, first = [], 0
    for expert, count in enumerate(counts):
        if count:
            runs.append(RowsOf(expert, first, first + count))
        first += count
    return tuple(runs)


class Grouped(nn.Module):
    """What a stock module becomes that has groups of experts. `held`: each group and the law of its
    route; `linears`: its own; `seen`: a list where router scores of this pass are wanted, else
    None; `heard`: what the call says beside its tokens.
    """

    stock: type[Any]
    linears: FfnLinears
    held: tuple[tuple[Group, CombineLaw], ...]
    seen: list[Scores] | None = None
    heard: Heard = Heard()

    def routers(self) -> Iterator[Any]:
        """Those of its groups, in order."""
        return (getattr(self, group.router) for group, _ in self.held)

    def readers(self) -> Iterator[Any]:
        """Routers and laws, which may look at signals."""
        yield from self.routers()
        yield from (law for _, law in self.held)

    def _padded(self, group: Group, law: CombineLaw) -> bool:
        """Whether the law leaves out padding, and the attention mask says which tokens are."""
        return KEPT in law.reads and group.tower in MASKED

    def picked(self, group: Group, law: CombineLaw, x: Tensor, lie: Sequence[int] = ()) -> Picked:
        """Who works on the tokens x [tokens, hidden], by the group's route. `lie`: [batch, length]
        of them, where these are known.
        """
        router = getattr(self, group.router)
        router.check()
        if (fixed := router.fixed(self.heard, x)) is not None:
            return Picked.of(fixed, group.choices)
        scores, likely = router(x, told(self.heard, group, x, lie)), router.likely(x)
        kept = self.heard.find(KEPT, len(x)) if self._padded(group, law) else None
        chosen = law.choose(scores, Beside(self.training, kept, likely))
        if self.seen is not None and router.learns:
            part = router.groups(self.heard, len(x))
            counted = chosen.expert if chosen.counted is None else chosen.counted
            straight = law.counts_straight
            self.seen.append(Scores(scores, counted, law.shares, part, likely, straight))
        return Picked.of(chosen, group.choices, law.sums)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the stock class says it: another process makes the class anew."""
        kind = type(self).__mro__[1]
        return (_blank, (kind, self.stock), *tuple(super().__reduce_ex__(protocol))[2:])


class Deep(Grouped):
    """A module whose linears may lie deeper. `paths`: where, by their names."""

    paths: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        path = self.__dict__.get("paths", {}).get(name, name)
        return super().__getattr__(name) if path == name else self.get_submodule(path)


class GroupedBlock(Grouped):
    """An FFN's module."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.mix(hidden_states)

    def mix(self, hidden_states: Tensor) -> Tensor:
        """What the groups, and the FFN beside them, give together [..., hidden]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        made: Tensor | None = None
        if all(group.base == "beside" for group, _ in self.held):
            made = self.own_ffn(x)
        for group, law in self.held:
            more = self._one(group, law, x, hidden_states.shape[:-1])
            made = more if made is None else made + more
        assert made is not None
        return made.view(*hidden_states.shape[:-1], -1)

    def _one(self, group: Group, law: CombineLaw, x: Tensor, lie: Sequence[int]) -> Tensor:
        """What one group gives."""
        after = getattr(self, group.router).after
        picked = self.picked(group, law, self.own_ffn(x) if after else x, lie)
        made: Tensor = getattr(self, group.name).mixed(self, x, picked, group.scale)
        return made

    def own_ffn(self, x: Tensor, linears: Mapping[str, Linear] | None = None) -> Tensor:
        """The family's own FFN of x [tokens, hidden], with these linears for its own."""
        if not linears and not getattr(self, "chunk_size_feed_forward", 0):
            made: Tensor = self.stock.forward(self, x)
            return made
        own = {name: Standin(one, self, name) for name, one in (linears or {}).items()}
        made = self.stock.forward(Swapped(self, own), x)
        return made


class Swapped:
    """A module as its forward sees it, with others for some of its own; methods that it calls see
    them too. Tokens are rows here, so what would cut them along a length does not.
    """

    chunk_size_feed_forward = 0
    forward = None  # asked by those that wrap a layer's, and want to know whether it is theirs

    def __init__(self, module: nn.Module, others: Mapping[str, Any]) -> None:
        self.__dict__.update(others)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__["_module"]
        found = getattr(module, name)
        mine = isinstance(found, MethodType) and found.__self__ is module
        return MethodType(found.__func__, self) if mine else found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.__dict__["_module"]
        run = module.stock if isinstance(module, Grouped) else type(module)
        return run.forward(self, *args, **kwargs)


class Standin:
    """What runs in the place of a linear; it has the linear's dtype for whoever asks."""

    __slots__ = ("_module", "_name", "_run")

    def __init__(self, run: Linear, module: Any, name: str) -> None:
        self._run, self._module, self._name = run, module, name

    @property
    def weight(self) -> Tensor | None:
        """Its own or the linear's, where either has one."""
        own = getattr(self._run, "weight", None)
        linear = getattr(self._module, self._name, None)
        return getattr(linear, "weight", None) if own is None else own

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)


_MADE: dict[tuple[type[Grouped], type[Any]], type[Grouped]] = {}


def grown(kind: type[Grouped], stock: type[Any]) -> type[Grouped]:
    """The class of a grouped module over a stock class: MoeLlamaMLP of LlamaMLP."""
    if (kind, stock) not in _MADE:
        said = {"stock": stock, "__module__": __name__, "__doc__": kind.__doc__}
        _MADE[kind, stock] = type(f"Moe{stock.__name__}", (kind, stock), said)
    return _MADE[kind, stock]


def _blank(kind: type[Grouped], stock: type[Any]) -> Grouped:
    cls = grown(kind, stock)
    return cls.__new__(cls)


def told(heard: Heard, group: Group, x: Tensor, lie: Sequence[int]) -> Heard:
    """What a call says to a route of x [tokens, hidden]. In a tower that no text goes through it
    says nothing but what is of its text as a whole; there all tokens are kept, as they lie [batch,
    length].
    """
    if group.tower in MASKED:
        return heard
    if len(lie) < 2:
        return Heard()
    whole = {name: heard.read(name) for name in OF_TEXT if name in heard.values}
    return Heard(whole | {KEPT: torch.ones(tuple(lie), dtype=torch.bool, device=x.device)})


def blocks(model: nn.Module) -> Iterator[Grouped]:
    """Those of a model, in order."""
    return (m for m in model.modules() if isinstance(m, Grouped))
