"""Experts that start as copies of the FFN, made different: the same random numbers as where a stock
class holds the experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from moetool.errors import UsageError
from moetool.methods.contract import Builder
from moetool.methods.upcycle.diversify import Diversify
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.surgery.ffn import LAST, FfnLinear
from moetool.surgery.spec import Stored, Target, rows, whole

_BOTH = {"gate_up": ("gate", "up")}  # in one matrix, one above the other


@dataclass(frozen=True)
class VariedCopies:
    """The copies of one block of one layer. `origin`: the source of each expert."""

    spot: Spot
    how: Diversify
    origin: Sequence[int]

    def write(self, build: Builder) -> None:
        """Plan them all."""
        spot, made = self.spot, dict[tuple[int, str], tuple[Target, Target | None]]()
        for expert, linear in spot.each():
            weight = self._target(build, expert, linear, spot.ground.stored(linear, spot.layer))
            bias = spot.ground.bias(linear, spot.layer)
            made[expert, linear.name] = (
                weight,
                None if bias is None else self._target(build, expert, linear, bias, "bias"),
            )
        for linear in spot.block.linears:
            for source, experts in groupby(range(spot.group.experts), self.origin.__getitem__):
                run = [*experts]
                targets = [made[e, linear.name] for e in run]
                self._run(build, linear, source, run[0], targets)

    def _target(
        self, build: Builder, expert: int, linear: FfnLinear, like: Stored, part: str = "weight"
    ) -> Target:
        return build.target(self.spot.name(expert, linear, part), like.dtype, like.shape)

    def _run(
        self,
        build: Builder,
        linear: FfnLinear,
        source: int,
        first: int,
        targets: Sequence[tuple[Target, Target | None]],
    ) -> None:
        """One linear of neighbouring experts from one source."""
        ground = (self.spot.ground, *self.spot.others)[source]
        stored = ground.stored(linear, self.spot.layer)
        axis = int((linear.role in LAST) != linear.transposed)
        for role, span in _parts(linear, stored.shape[0]):
            build.task(
                "neurons",
                [replace(rows(stored, *span), source=source)],
                [rows(weight, *span) for weight, _ in targets],
                axis=axis,
                first=first,
                **self.how.params(self.spot.layer, role, self.spot.seed),
            )
        bias = ground.bias(linear, self.spot.layer)
        if bias is None:
            return
        outs = [whole(target) for _, target in targets if target is not None]
        order = Diversify(permute=self.how.permute and linear.role not in LAST)
        if not order.permute:
            for out in outs:
                build.copy(whole(bias, source), out)
            return
        said = order.params(self.spot.layer, f"{linear.role}_bias", self.spot.seed)
        build.task("neurons", [whole(bias, source)], outs, axis=0, first=first, **said)


def check(ground: Ground, how: Diversify) -> None:
    """Refuse matrices whose neurons cannot be told apart."""
    for linear in ground.block.linears:
        biased = ground.bias(linear, ground.layers[0]) is not None
        if linear.role in _BOTH and (linear.transposed or biased):
            raise UsageError(
                "copies of an FFN with two matrices in one cannot be made different",
                expected="gate above up, without a bias",
                found=f"{linear.name}, {'[in, out]' if linear.transposed else 'with a bias'}",
                hint="leave out --diversify",
            )


def _parts(linear: FfnLinear, height: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The matrices in one, with the rows of each."""
    roles = _BOTH.get(linear.role, (linear.role,))
    each = height // len(roles)
    for number, role in enumerate(roles):
        yield role, (number * each, (number + 1) * each)
