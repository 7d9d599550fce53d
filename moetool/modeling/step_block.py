"""A layer that runs its FFN itself, step by step, with groups of experts: what stands around the
FFN there (residual, norm, dropout) stays the layer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moetool.modeling.block import Deep, GroupedBlock, Linear, Standin, Swapped

Tensor = torch.Tensor


class StepBlock(Deep, GroupedBlock):
    """A layer. `steps`: paths of what runs one after the other before the last linear. In the
    layer's own forward the steps give what they get, and in the place of the last linear the
    experts run.
    """

    steps: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock layer's."""
        stands: dict[str, Any] = dict.fromkeys(self.steps, _itself)
        stands[self.paths[self.linears.out]] = self.mix
        return swapped(self, stands)(*args, **kwargs)

    def own_ffn(self, x: Tensor, linears: Mapping[str, Linear] | None = None) -> Tensor:
        """The steps and the last linear for x [tokens, hidden], with these linears for its own."""
        given = {self.paths[name]: linear for name, linear in (linears or {}).items()}
        for step in (*self.steps, self.paths[self.linears.out]):
            x = self._run(step, given, x)
        return x

    def _run(self, step: str, given: Mapping[str, Linear], x: Tensor) -> Tensor:
        inside = {p.removeprefix(f"{step}."): f for p, f in given.items() if p.startswith(step)}
        if step in given:
            return given[step](x)
        module = self.get_submodule(step)
        made: Tensor = swapped(module, inside)(x) if inside else module(x)
        return made


def swapped(module: Any, stands: Mapping[str, Any]) -> Swapped:
    """A module with others in the place of some, however deep these lie."""
    here: dict[str, Any] = {}
    for path, other in stands.items():
        name, _, rest = path.partition(".")
        if rest:
            deeper = {p.partition(".")[2]: o for p, o in stands.items() if p.startswith(f"{name}.")}
            here[name] = swapped(getattr(module, name), deeper)
        else:
            here[name] = Standin(other, module, name) if callable(other) else other
    return Swapped(module, here)


def _itself(x: Tensor) -> Tensor:
    return x
