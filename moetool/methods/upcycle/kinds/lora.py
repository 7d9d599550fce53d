"""Low-rank experts: the FFN is kept once, and each expert changes it by B A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Settings
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.upcycle import adapters, assemble
from moetool.methods.upcycle.adapters import Adapter, LowRankExpert
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.surgery import ops
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.ffn import FfnLinear
from moetool.surgery.groups import Group
from moetool.surgery.reform import Into
from moetool.surgery.route import ROUTED
from moetool.surgery.spec import Piece, Stored, whole

PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LowRank:
    """The options of low-rank experts."""

    rank: int = option(16, "rank of each expert's change", WHAT, minimum=1)
    alpha: float | None = option(
        None, "the change is B A times alpha / rank; twice the rank where it is not said"
    )
    from_adapters: tuple[str, ...] = option(
        (),
        "a folder of a PEFT adapter that becomes an expert, or of MixLoRA that becomes all; "
        "repeat it",
        WHAT,
        unit="files",
        metavar="DIR",
    )
    rank_energy: float = option(
        0.0,
        "with --from: the rank, equal for all, that keeps this share of what fine-tunes changed "
        "(0: --rank)",
        unit="share",
        metavar="SHARE",
    )


class LowRankKind(ExpertKind):
    """Low-rank experts over the layer's own FFN, which all of them share: A is drawn, B is zero, so
    that the model is exactly its source until it is trained; or adapters, or what fine-tunes
    changed.

    LLaVA-MoLE (arXiv 2401.16160): top-1, hard. MixLoRA (arXiv 2404.15159): top-2, renormalised.
    DeRS (arXiv 2503.01359): thin differences of fine-tunes.
    """

    name = "lora"
    Options: ClassVar[type] = LowRank
    own: LowRank
    takes: ClassVar[tuple[str, ...]] = ("expert_map",)
    several = True

    @property
    def rank(self) -> int:
        return int(self.found.chosen.get("rank", self.own.rank))

    @property
    def alpha(self) -> float:
        if "alpha" in self.found.chosen:
            return float(self.found.chosen["alpha"])
        return 2.0 * self.rank if self.own.alpha is None else self.own.alpha

    def told(self) -> None:
        super().told()
        own, usual = self.own, LowRank()
        if own.from_adapters and (
            own.rank != usual.rank or own.alpha is not None or own.rank_energy
        ):
            raise UsageError(
                "adapters have their own rank and alpha",
                expected="--from-adapters without --rank, --alpha and --rank-energy",
                found=f"--rank {own.rank} --alpha {own.alpha} --rank-energy {own.rank_energy:g}",
                hint="leave them out",
            )

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        given = self.own.from_adapters
        if not given and len(sources) == 1:
            if self.own.rank_energy:
                raise UsageError(
                    "--rank-energy does nothing without --from",
                    found="--rank-energy alone",
                    hint="give the fine-tunes that experts come from",
                )
            return Decisions()
        if given and len(sources) > 1:
            raise UsageError(
                "experts come from adapters or from fine-tunes, not from both",
                found="--from-adapters and --from",
                hint="leave out one of them",
            )
        grounds = [Ground.of(source, self.verb.layers) for source in sources]
        self.check(grounds[0])
        if not given:
            return _changes(grounds, self.own, settings)
        read = [
            adapters.read(folder, n, grounds[0], settings.work) for n, folder in enumerate(given)
        ]
        return self._adapted(read, grounds[0])

    def _adapted(self, read: Sequence[Adapter], ground: Ground) -> Decisions:
        """What the plan must know of adapters, which do not travel with the output."""
        first = read[0]
        for other in read[1:]:
            one, two = (
                f"rank {a.rank}, alpha {a.alpha:g}, of {', '.join(a.targets)}"
                for a in (first, other)
            )
            if one != two:
                raise UsageError(
                    "adapters of one group are alike",
                    file=other.folder,
                    expected=f"{one}, as in {first.folder}",
                    found=two,
                    hint="give adapters of one rank, alpha and set of target modules",
                )
        experts = list(chain.from_iterable(adapter.experts for adapter in read))
        if len(experts) != self.verb.experts:
            raise UsageError(
                "not as many experts as adapters",
                expected=f"--experts {len(experts)}",
                found=f"--experts {self.verb.experts}",
                hint=f"use --experts {len(experts)}",
            )
        chosen: JsonObject = {
            "rank": first.rank,
            "alpha": first.alpha,
            "experts": [[e.source, e.head, e.middle, e.suffix] for e in experts],
        }
        every = [linear.name for linear in ground.block.linears]
        if set(first.targets) != set(every):
            chosen["targets"] = list(first.targets)
        if first.router and len(read) == 1:
            chosen["router"] = first.router
        return Decisions(chosen=chosen, extra=tuple(a.weights for a in read))

    def told_by(self, found: Decisions) -> tuple[str, ...]:
        super().told_by(found)
        errors: dict[str, float] = found.chosen.get("errors", {})
        if not errors:
            return ()
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        return (
            f"rank {self.rank} holds what fine-tunes changed with a relative error of {mean:.3f} "
            f"on average, at most {errors[worst]:.3f} ({worst})",
        )

    def check(self, ground: Ground) -> None:
        if self.own.alpha == 0:
            raise UsageError(
                "--alpha 0 leaves every change out, and nothing to train",
                expected="any other number",
                found="--alpha 0",
                hint="leave out --alpha: twice the rank",
            )
        most = min(ground.hidden, ground.width)
        if self.rank > most:
            raise UsageError(
                "the rank is larger than the matrices are wide",
                expected=f"--rank at most {most}",
                found=f"--rank {self.rank}",
                hint="for example --rank 16",
            )

    def params(self, ground: Ground) -> JsonObject:
        targets = self.found.chosen.get("targets")
        return {"rank": self.rank, "alpha": self.alpha} | ({"targets": targets} if targets else {})

    def router(self, build: Builder, spot: Spot) -> Piece | None:
        template = self.found.chosen.get("router")
        if not template or self.key.name != ROUTED:
            return None
        return whole(self.found.extra[0].tensor(template.format(layer=spot.layer)), 1)

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        given = [LowRankExpert(*e) for e in self.found.chosen.get("experts", ())]
        sources = 1 + len(spot.others)
        origin = assemble.expert_map(self.verb.expert_map, self.verb.experts, 1, sources)
        for expert, linear in spot.each():
            if not spot.group.has(linear.name):
                continue
            if given:
                self._copied(build, spot, expert, linear, given[expert])
            elif origin[expert]:
                self._changed(build, spot, expert, linear, origin[expert])
            else:
                self._drawn(build, spot, expert, linear)
        return {}

    def _copied(
        self, build: Builder, spot: Spot, expert: int, linear: FfnLinear, given: LowRankExpert
    ) -> None:
        """An adapter's tensors, byte for byte."""
        tail = adapters.tail_of(spot.ground, linear.slot.name, spot.layer)
        for part in PARTS:
            held = self.found.extra[given.source].tensor(given.name(tail, part))
            target = build.target(spot.name(expert, linear, part), held.dtype, held.shape)
            build.copy(whole(held, 1 + given.source), whole(target))

    def _places(
        self, build: Builder, spot: Spot, expert: int, linear: FfnLinear
    ) -> tuple[Stored, list[Piece]]:
        """The FFN's own matrix, and where lora_A and lora_B of an expert go."""
        stored = spot.ground.stored(linear, spot.layer)
        out, into = linear.sides(stored.shape)
        shapes = {"lora_A": (self.rank, into), "lora_B": (out, self.rank)}
        made = [
            build.target(spot.name(expert, linear, part), stored.dtype, shapes[part])
            for part in PARTS
        ]
        return stored, [whole(target) for target in made]

    def _changed(
        self, build: Builder, spot: Spot, expert: int, linear: FfnLinear, source: int
    ) -> None:
        """What a fine-tune changed."""
        stored, places = self._places(build, spot, expert, linear)
        tuned = spot.others[source - 1].stored(linear, spot.layer)
        build.task(
            "change",
            [whole(stored), whole(tuned, source)],
            places,
            rank=self.rank,
            scale=self.alpha / self.rank,
            transposed=linear.transposed,
        )

    def _drawn(self, build: Builder, spot: Spot, expert: int, linear: FfnLinear) -> None:
        """A change that is none yet."""
        _, (a, b) = self._places(build, spot, expert, linear)
        build.task("draw", [], [a], law="kaiming", seed=spot.seed, name=a.name)
        build.task("zeros", [], [b])

    def certificate(self, group: Group, sources: int) -> Certificate:
        if sources > 1 or self.found.extra:
            why = "experts come from adapters or fine-tunes: there is no single function to keep"
            return Certificate("none", why, None)
        return super().certificate(group, sources)


def _changes(grounds: Sequence[Ground], own: LowRank, settings: Settings) -> Decisions:
    """The rank that keeps what fine-tunes changed, and what it loses of every matrix; one matrix
    at a time.
    """
    from moetool.kernels import change
    from moetool.progress import Stage

    base, *tuned = grounds
    places = list(product(range(len(tuned)), base.layers, base.block.linears))
    seen = {}
    for done, (number, layer, linear) in enumerate(places):
        before, after = base.stored(linear, layer), tuned[number].stored(linear, layer)
        apart = tuned[number].source.matrix(after.name).double()
        apart -= base.source.matrix(before.name).double()
        seen[f"{number + 1}:{before.name}"] = change.spectrum(apart)
        settings.tell(Stage("look"), done + 1, len(places))
    rank = own.rank
    if own.rank_energy:
        rank = max(change.rank_for(values, own.rank_energy) for values in seen.values())
    errors = {name: round(change.lost(values, rank), 6) for name, values in seen.items()}
    widest = max(base.stored(one, layer).elements for _, layer, one in places)
    memory = ops.RESERVE + ops.NUMPY_RESERVE + ops.TORCH_RESERVE + 6 * 8 * widest
    return Decisions(chosen={"rank": rank, "errors": errors}, memory=memory)
