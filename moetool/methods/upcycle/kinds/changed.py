"""What kinds of experts share that hold what fine-tunes changed in the FFN."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from moetool.data import JsonObject
from moetool.methods.contract import Builder, Certificate, Decisions, Settings
from moetool.methods.upcycle import assemble
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.surgery import ops
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.ffn import FfnLinear
from moetool.surgery.groups import LINEAR, Group
from moetool.surgery.reform import Into
from moetool.surgery.spec import Piece, Stored, whole

if TYPE_CHECKING:
    from torch import Tensor

BIASES = "changed_biases"
SHOWN = 8  # names in a sentence


class ChangedMatrix(NamedTuple):
    """A matrix of a fine-tune less the base's, float64; `turned` to [out, in]."""

    name: str
    matrix: Tensor


class OneLinear(NamedTuple):
    """One linear of one expert: the FFN's own matrix, and where the parts of a change go."""

    spot: Spot
    expert: int
    linear: FfnLinear

    @property
    def stored(self) -> Stored:
        return self.spot.ground.stored(self.linear, self.spot.layer)

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in)"""
        return self.linear.sides(self.stored.shape)

    def place(self, build: Builder, part: str, dtype: str, shape: tuple[int, ...]) -> Piece:
        """A part of the expert that is to be written."""
        name = self.spot.name(self.expert, self.linear, part)
        return whole(build.target(name, dtype, shape))

    def inputs(self, source: int) -> list[Piece]:
        """The base's matrix and that of the fine-tune."""
        tuned = self.spot.others[source - 1].stored(self.linear, self.spot.layer)
        return [whole(self.stored), whole(tuned, source)]


class ChangeKind(ExpertKind):
    """Subclass it: experts over the FFN that hold a change, which `changed` writes of a fine-tune
    and `unchanged` where there is none yet. `lost` says what a change loses.
    """

    takes: ClassVar[tuple[str, ...]] = ("expert_map",)
    several = True
    sites = ("ffn", LINEAR)

    @property
    def stands(self) -> str:
        return "beside" if self.verb.site == LINEAR else self.base

    @property
    def starts(self) -> str:  # type: ignore[override]
        return "zero" if self.verb.site == LINEAR else "ffn"

    def params(self, ground: Ground) -> JsonObject:
        return {"linears": [*self.linears]} if self.linears else {}

    @abstractmethod
    def changed(self, build: Builder, one: OneLinear, source: int) -> None:
        """What a fine-tune changed."""

    @abstractmethod
    def unchanged(self, build: Builder, one: OneLinear) -> None:
        """A change that is none yet."""

    def lost(self, change: Tensor) -> float:
        """The error of what is kept of a change [out, in], relative (Frobenius)."""
        raise NotImplementedError

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        if len(sources) == 1:
            return Decisions()
        grounds = [self.ground(source) for source in sources]
        self.check(grounds[0])
        seen = changes(grounds, settings)
        errors = {name: round(self.lost(change.float()), 6) for name, change in seen}
        return looked({"errors": errors}, grounds)

    def told_by(self, found: Decisions) -> tuple[str, ...]:
        super().told_by(found)
        return (*self._how_far(found), *_biases_told(found))

    def _how_far(self, found: Decisions) -> tuple[str, ...]:
        """What is lost of the matrices' changes, as a sentence."""
        errors: Mapping[str, float] = found.chosen.get("errors", {})
        if not errors:
            return ()
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        return (
            f"{self.kept} holds what fine-tunes changed with a relative error of {mean:.3f} "
            f"on average, at most {errors[worst]:.3f} ({worst})",
        )

    @property
    def kept(self) -> str:
        """How much is held of a change, in words."""
        raise NotImplementedError

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        sources = 1 + len(spot.others)
        origin = assemble.expert_map(self.verb.expert_map, self.verb.experts, 1, sources)
        for expert, linear in spot.each():
            if not spot.group.has(linear.name):
                continue
            one = OneLinear(spot, expert, linear)
            if origin[expert]:
                self.changed(build, one, origin[expert])
            else:
                self.unchanged(build, one)
        return {}

    def certificate(self, group: Group, sources: int) -> Certificate:
        if sources > 1 or self.found.extra:
            why = "experts come from adapters or fine-tunes: there is no single function to keep"
            return Certificate("none", why, None)
        return super().certificate(group, sources)


def changes(grounds: Sequence[Ground], settings: Settings) -> Iterator[ChangedMatrix]:
    """What every fine-tune changed in every matrix, one at a time."""
    from moetool.progress import Stage

    base, *tuned = grounds
    places = list(product(range(len(tuned)), base.layers, base.linears))
    for done, (number, layer, linear) in enumerate(places):
        before, after = base.stored(linear, layer), tuned[number].stored(linear, layer)
        apart = tuned[number].source.matrix(whole(after)).double()
        apart -= base.source.matrix(whole(before)).double()
        turned = apart.T if linear.transposed else apart
        yield ChangedMatrix(f"{number + 1}:{before.name}", turned)
        settings.tell(Stage("look"), done + 1, len(places))


def looked(chosen: JsonObject, grounds: Sequence[Ground]) -> Decisions:
    """What was decided of fine-tunes, with the names of the biases that they changed."""
    biases = changed_biases(grounds)
    more: JsonObject = {BIASES: biases} if biases else {}
    return Decisions(chosen=chosen | more, memory=memory(grounds[0]))


def changed_biases(grounds: Sequence[Ground]) -> list[str]:
    """Biases that fine-tunes changed beside the matrices, as `1:model.layers.0.mlp.c_fc.bias`. A
    change of a matrix holds none, so that each expert has the base's.
    """
    base, *tuned = grounds
    found = []
    for number, layer, linear in product(range(len(tuned)), base.layers, base.linears):
        before, after = (one.bias(linear, layer) for one in (base, tuned[number]))
        if before is None or after is None:
            continue  # both lack it: sources are alike
        if base.source.content(before) != tuned[number].source.content(after):
            found.append(f"{number + 1}:{before.name}")
    return found


def _biases_told(found: Decisions) -> tuple[str, ...]:
    names: Sequence[str] = found.chosen.get(BIASES, ())
    if not names:
        return ()
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return (
        f"experts have the base's biases: what fine-tunes changed in {len(names)} of them is left "
        f"out ({shown}); whole copies keep it (--target moetool, without --form)",
    )


def memory(base: Ground) -> int:
    """Peak bytes of looking at one change after the other."""
    places = product(base.linears, base.layers)
    widest = max(base.stored(*place).elements for place in places)
    return ops.RESERVE + ops.NUMPY_RESERVE + ops.TORCH_RESERVE + 6 * 8 * widest
