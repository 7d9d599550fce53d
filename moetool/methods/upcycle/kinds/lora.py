"""Low-rank experts: the FFN is kept once, and each expert changes it by B A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Settings
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.upcycle import adapters, xlora
from moetool.methods.upcycle.adapters import Adapter, LowRankExpert
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.changed import ChangeKind, OneLinear, changes, looked
from moetool.methods.upcycle.xlora import XLoraFolder
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import LINEAR, LINEARWISE, Group, linear_of
from moetool.surgery.reform import Into
from moetool.surgery.route import ROUTED, TWOPASS
from moetool.surgery.spec import Piece, whole

PARTS = ("lora_A", "lora_B")
FFNS = "ffns"


@dataclass(frozen=True)
class LowRank:
    """The options of low-rank experts."""

    rank: int = option(16, "rank of each expert's change", WHAT, minimum=1)
    alpha: float | None = option(
        None, "the change is B A times alpha / rank; twice the rank where it is not said"
    )
    from_adapters: tuple[str, ...] = option(
        (),
        "a folder of a PEFT adapter that becomes an expert, or of MixLoRA or X-LoRA that becomes "
        "all; repeat it",
        WHAT,
        unit="files",
        metavar="DIR",
    )
    lora_mix: str = option(
        FFNS,
        "what is mixed: the FFNs of a token's experts, or inside each linear what they add to it",
        choices=(FFNS, *LINEARWISE),
    )
    merge_attention: bool = option(
        False,
        "with --from-adapters DIR: what the adapter changes of the attention becomes part of the "
        "base's weights (one adapter, or a MixLoRA folder); it is refused otherwise",
    )
    rank_energy: float = option(
        0.0,
        "with --from: the rank, equal for all, that keeps this share of what fine-tunes changed "
        "(0: --rank)",
        unit="share",
        metavar="SHARE",
    )


class LowRankKind(ChangeKind):
    """Low-rank experts over the layer's own FFN, which all of them share: A is drawn, B is zero, so
    that the model is exactly its source until it is trained; or adapters, or what fine-tunes
    changed.

    LLaVA-MoLE (arXiv 2401.16160): top-1, hard. MixLoRA (arXiv 2404.15159): top-2, renormalised.
    DeRS (arXiv 2503.01359): thin differences of fine-tunes.
    """

    name = "lora"
    Options: ClassVar[type] = LowRank
    own: LowRank

    @property
    def inside(self) -> bool:
        """Whether what experts add is mixed inside each linear."""
        return self.own.lora_mix != FFNS

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
        if self.inside and self.verb.site == LINEAR:
            raise UsageError(
                "--lora-mix is of the linears of an FFN behind one router",
                expected="--site ffn",
                found=f"--lora-mix {own.lora_mix} --site {LINEAR}",
                hint="leave out --lora-mix: at this site each linear mixes by itself",
            )
        if own.merge_attention and (len(own.from_adapters) != 1 or self.verb.site == LINEAR):
            raise UsageError(
                "one attention has the change of one adapter",
                expected="--from-adapters DIR, once, at the FFN",
                found=f"{len(own.from_adapters)} adapters at {self.verb.site}",
                hint="leave out --merge-attention; --site linear takes adapters of the attention",
            )
        if own.from_adapters and (
            own.rank != usual.rank or own.alpha is not None or own.rank_energy
        ):
            raise UsageError(
                "adapters have their own rank and alpha",
                expected="--from-adapters without --rank, --alpha and --rank-energy",
                found=f"--rank {own.rank} --alpha {own.alpha} --rank-energy {own.rank_energy:g}",
                hint="leave them out",
            )

    def copied(self, build: Builder, ground: Ground, name: str) -> bool:
        """Attention with what an adapter changed, where that was asked for."""
        parts = self.found.chosen.get("merged", {}).get(name)
        if parts is None:
            return False
        (weights,), stored = self.found.extra, ground.source.tensors[name]
        low = [whole(weights.tensor(part), 1) for part in parts]
        turned = any(one.transposed for one in ground.linears)
        build.task(
            "low_rank_sum",
            [whole(stored), *low],
            [whole(build.target(name, stored.dtype, stored.shape))],
            scale=self.alpha / self.rank,
            transposed=turned,
        )
        return True

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
        grounds = [self.ground(source) for source in sources]
        self.check(grounds[0])
        if not given:
            return _changes(grounds, self.own, settings)
        how = adapters.AdaptersRead(settings.work, self.own.merge_attention)
        twice = XLoraFolder.read(given)
        if twice is not None and self.key.name != TWOPASS:
            raise UsageError(
                "a folder of X-LoRA has a classifier, which looks at a pass before",
                file=given[0],
                expected=f"--site {LINEAR} --key {TWOPASS}",
                found=f"--key {self.key.name}",
                hint="its adapters alone are folders in it: give these with another key",
            )
        if twice is not None and (self.key.own, self.combine.own) != (
            self.key.Options(),
            self.combine.Options(),
        ):
            raise UsageError(
                "a folder of X-LoRA says itself what its classifier is",
                file=given[0],
                expected=f"--key {TWOPASS} without options of its own, or of the law",
                found="others",
                hint="leave them out",
            )
        folders = [*twice.adapters.values()] if twice else given
        read = [adapters.read(folder, n, grounds[0], how) for n, folder in enumerate(folders)]
        made = self._adapted(read, grounds[0])
        return twice.decided(made, grounds[0], read[0].targets) if twice else made

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
        every = {linear_of(linear.slot.name) for linear in ground.linears}
        if set(first.targets) != every:
            which = "linears" if self.verb.site == LINEAR else "targets"
            chosen[which] = list(first.targets)
        if first.merged:
            chosen["merged"] = {name: list(parts) for name, parts in first.merged.items()}
        if first.router and len(read) == 1:
            chosen["router"] = first.router
        return Decisions(chosen=chosen, extra=tuple(a.weights for a in read))

    @property
    def kept(self) -> str:
        return f"rank {self.rank}"

    def check(self, ground: Ground) -> None:
        if self.own.alpha == 0:
            raise UsageError(
                "--alpha 0 leaves every change out, and nothing to train",
                expected="any other number",
                found="--alpha 0",
                hint="leave out --alpha: twice the rank",
            )
        stored = ((one, ground.stored(one, ground.layers[0])) for one in ground.linears)
        most = min(min(one.sides(matrix.shape)) for one, matrix in stored)
        if self.rank > most:
            raise UsageError(
                "the rank is larger than the matrices are wide",
                expected=f"--rank at most {most}",
                found=f"--rank {self.rank}",
                hint="for example --rank 16",
            )

    def params(self, ground: Ground) -> JsonObject:
        targets = self.found.chosen.get("targets")
        said = {"rank": self.rank, "alpha": self.alpha} | ({"targets": targets} if targets else {})
        said |= {"mix": self.own.lora_mix} if self.inside else {}
        return said | super().params(ground)

    def certificate(self, group: Group, sources: int) -> Certificate:
        if self.inside and sources == 1 and not self.own.from_adapters:
            why = "the FFN stays as it is and what is added inside its linears starts at zero"
            return Certificate("exact", f"{why}, whatever the router says")
        return super().certificate(group, sources)

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(self.found.chosen.get("linears", super().linears))

    def group(self, ground: Ground) -> Group:
        made, said = super().group(ground), self.found.chosen.get("route")
        return made if said is None else replace(made, route=replace(made.route, options=said))

    def routed(self, build: Builder, spot: Spot) -> bool:
        if "classifier" in self.found.chosen:
            xlora.write(build, spot, self.found.chosen, self.found.extra)
        return "classifier" in self.found.chosen

    def router(self, build: Builder, spot: Spot) -> Piece | None:
        template = self.found.chosen.get("router")
        if not template or self.key.name != ROUTED:
            return None
        return whole(self.found.extra[0].tensor(template.format(layer=spot.layer)), 1)

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        given = [LowRankExpert(*e) for e in self.found.chosen.get("experts", ())]
        if not given:
            return super().write(build, spot)
        for expert, linear in spot.each():
            if spot.group.has(linear.name):
                self._copied(build, OneLinear(spot, expert, linear), given[expert])
        return {}

    def _copied(self, build: Builder, one: OneLinear, given: LowRankExpert) -> None:
        """An adapter's tensors, byte for byte."""
        tail = adapters.tail_of(one.spot.ground, one.linear.slot.name, one.spot.layer)
        for part in PARTS:
            held = self.found.extra[given.source].tensor(given.name(tail, part))
            build.copy(
                whole(held, 1 + given.source), one.place(build, part, held.dtype, held.shape)
            )

    def _places(self, build: Builder, one: OneLinear) -> list[Piece]:
        """Where lora_A and lora_B of an expert go."""
        (out, into), dtype = one.sides, one.stored.dtype
        shapes = {"lora_A": (self.rank, into), "lora_B": (out, self.rank)}
        return [one.place(build, part, dtype, shapes[part]) for part in PARTS]

    def changed(self, build: Builder, one: OneLinear, source: int) -> None:
        build.task(
            "change",
            one.inputs(source),
            self._places(build, one),
            rank=self.rank,
            scale=self.alpha / self.rank,
            transposed=one.linear.transposed,
        )

    def unchanged(self, build: Builder, one: OneLinear) -> None:
        a, b = self._places(build, one)
        build.task("draw", [], [a], law="kaiming", seed=one.spot.seed, name=a.name)
        build.task("zeros", [], [b])


def _changes(grounds: Sequence[Ground], own: LowRank, settings: Settings) -> Decisions:
    """The rank that keeps what fine-tunes changed, and what it loses of every matrix; one matrix
    at a time.
    """
    from moetool.kernels import change

    seen = {name: change.spectrum(apart) for name, apart in changes(grounds, settings)}
    rank = own.rank
    if own.rank_energy:
        rank = max(change.rank_for(values, own.rank_energy) for values in seen.values())
    errors = {name: round(change.lost(values, rank), 6) for name, values in seen.items()}
    return looked({"rank": rank, "errors": errors}, grounds)
