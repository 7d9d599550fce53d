"""What experts add to what goes into the linears of a module, or to what comes out of the last: in
front of an attention (LaVIN, arXiv 2305.15023; PILL, arXiv 2311.02126), or behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from moetool.modeling.block import Grouped, Picked
from moetool.modeling.experts.adding import AddingExperts

_Linear = Callable[[Tensor], Tensor]


class Around(NamedTuple):
    """Experts that add to tokens, who of them works on which, and a factor on what they add."""

    experts: AddingExperts
    picked: Picked
    scale: float

    def added(self, rows: Tensor) -> Tensor:
        """What they add to rows [tokens, hidden]."""
        made = self.experts.added(rows, self.picked)
        return made if self.scale == 1.0 else made * self.scale


class _Changing:
    """x with what experts add to it, all of them to x as it came. Several linears see the same x:
    it is changed once.
    """

    def __init__(self, around: Sequence[Around]) -> None:
        self.around = around
        self.seen: Tensor | None = None
        self.made: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.made is None or self.seen is not x:
            rows = x.reshape(-1, x.shape[-1])
            total = rows
            for one in self.around:
                total = total + one.added(rows)
            self.seen, self.made = x, total.view(x.shape)
        return self.made


def surround(
    block: Grouped, into: Sequence[str], stands: dict[str, Any], around: Sequence[Around]
) -> None:
    """Put what experts add around what stands for the linears of a block (`stands`, by name), or
    around its own; `into`: those that see the block's tokens.
    """
    lie = block.linears
    before, after = ([a for a in around if a.experts.before is at] for at in (True, False))
    if before:
        changing = _Changing(before)
        for name in into:
            stands[name] = _then(changing, stands.get(name) or getattr(block, name))
    if after:
        own = stands.get(lie.out) or getattr(block, lie.out)
        stands[lie.out] = _then(own, _Changing(after))


def _then(first: _Linear, second: _Linear) -> _Linear:
    return lambda x: second(first(x))
