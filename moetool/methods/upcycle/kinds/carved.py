"""Parts of the FFN: neurons that fire together, those that fire most in one that always runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Settings
from moetool.methods.field import TEXT, WHAT
from moetool.methods.options import Text, option, same
from moetool.methods.upcycle import carve, reordering
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.keys.neurons import NeuronsKey
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.methods.upcycle.laws.law import INSIDE
from moetool.methods.upcycle.options import Upcycling
from moetool.surgery import groups
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import PART, Group
from moetool.surgery.reform import FORMS, Into

_GATED = ({"gate", "up", "down"}, {"gate_up", "down"})


@dataclass(frozen=True)
class TextShown:
    """The options of all such experts."""

    calibrate: tuple[str, ...] = same(Text, "calibrate")
    tokens: int = same(Text, "tokens")
    seq_len: int = same(Text, "seq_len")
    pack: bool = same(Text, "pack")
    text_field: str = same(Text, "text_field", needs=("calibrate",))
    batch_tokens: int = same(Text, "batch_tokens")
    trust_remote_code: bool = same(Text, "trust_remote_code", needs=("calibrate",))
    carve_shared: int = option(
        2, "of the parts of --split, those that always run: neurons that matter most", WHAT
    )

    @property
    def text(self) -> Text:
        """How text is read and cut."""
        return Text(
            calibrate=self.calibrate,
            tokens=self.tokens,
            seq_len=self.seq_len,
            pack=self.pack,
            text_field=self.text_field,
            batch_tokens=self.batch_tokens,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class Firing(TextShown):
    """The options of parts by what fires."""

    carve_marks: int = option(
        10, "neurons that count as firing on a token: so many of the strongest", TEXT, minimum=1
    )


class CarvedKind(ExpertKind):
    """Parts of the FFN with --carve activation: neurons that fire together on --calibrate become an
    expert, those that fire most always run; the FFN's own bytes in another order, and nothing is
    trained. CMoE (arXiv 2502.04416).
    """

    name = "carved"
    asked = f"--carve {carve.ACTIVATION}"
    carving = carve.ACTIVATION  # what --carve says
    law = "hard"
    looks = "neurons"
    Options: ClassVar[type] = Firing
    own: TextShown
    takes: ClassVar[tuple[str, ...]] = ("carve", "split")

    @classmethod
    def meant(cls, said: Upcycling) -> bool:
        return said.form == cls.name or (said.form in FORMS and said.carve == cls.carving)

    @classmethod
    def needs_text(cls) -> bool:
        """What fires together is seen on text."""
        return True

    @property
    def spelled(self) -> str:
        return self.asked

    @property
    def stands(self) -> str:
        return INSIDE

    @property
    def choices(self) -> int:
        return self.verb.split - self.own.carve_shared

    def width(self, ground: Ground, group: Group) -> int:
        return ground.width // self.verb.split

    def told(self) -> None:
        said, shared = self.verb, self.own.carve_shared
        if said.carve != self.carving:
            raise self.wrong(self.asked, f"--form {self.name} --carve {said.carve}")
        if not 0 <= shared < said.split:
            raise self.wrong(
                f"--carve-shared below --split {said.split}", f"--carve-shared {shared}"
            )
        if said.experts not in (Upcycling.experts, self.choices):
            raise self.wrong(f"--experts {self.choices}, or none", f"--experts {said.experts}")
        if not 1 <= said.top_k <= self.choices:
            raise self.wrong(f"--top-k of 1 to {self.choices}", f"--top-k {said.top_k}")
        super().told()
        self.told_route()
        if not self.own.calibrate:
            raise UsageError(
                f"{self.spelled} looks at text",
                expected="--calibrate FILE",
                found=f"{self.spelled} alone",
                hint="--carve kmeans:gate looks at weights alone",
            )

    def told_route(self) -> None:
        """Refuse a route that is not the parts' own."""
        if not isinstance(self.key, NeuronsKey) or self.key.own != NeuronsKey.Options():
            raise self.wrong("--key neurons, whose neurons are read off", f"--key {self.key.name}")
        if self.combine.name != self.law:
            raise self.wrong("--law hard: each part counts once", f"--law {self.combine.name}")

    def wrong(self, expected: str, found: str) -> UsageError:
        """What to say of options that do not go together."""
        return UsageError(
            f"{self.asked} does not go with that",
            expected=expected,
            found=found,
            hint="for example --split 16 --carve-shared 2 --top-k 2",
        )

    def check(self, ground: Ground) -> None:
        roles = {linear.role for linear in ground.block.linears}
        biased = any(ground.bias(one, ground.layers[0]) for one in ground.block.linears)
        lies = any(one.transposed for one in ground.block.linears)
        if roles not in _GATED or biased or lies or groups.is_ours(ground.source.config):
            raise UsageError(
                f"{self.spelled} needs a dense model whose FFNs have a gate and no biases",
                expected="gate, up and down as [out, in]",
                found=f"{', '.join(sorted(roles))}{' with biases' if biased else ''} "
                f"of {ground.source.config.get('model_type')}",
                hint="--carve kmeans:gate, or another --form",
            )
        carve.check_width(ground.width, self.verb.split)
        reordering.check(ground)
        marks = getattr(self.own, "carve_marks", 1)
        if marks > ground.width:
            raise self.wrong(f"--carve-marks up to {ground.width}", f"{marks}")

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Send the text through, and cut each layer's FFN on the way."""
        from moetool.methods.upcycle import firing

        ground = self.ground(sources[0])
        self.check(ground)
        said = self.key.options(ground, self.choices, self.verb.top_k)
        own = cast("Firing", self.own)
        act = said.get("act", "silu")
        cut = firing.Cutting(self.verb.split, own.carve_shared, own.carve_marks, act)
        return firing.decide(ground, cut, own.text, settings)

    def told_by(self, found: Decisions) -> tuple[str, ...]:
        super().told_by(found)
        cast("NeuronsKey", self.key).shown = carve.leads_of(found.tables)
        return tuple(found.report.get("warnings", ()))

    def group(self, ground: Ground) -> Group:
        shared = self.own.carve_shared
        return replace(
            super().group(ground),
            form=PART,
            experts=self.choices,
            base="under",
            params={"shared": shared} if shared else {},
        )

    def copied(self, build: Builder, ground: Ground, name: str) -> bool:
        return reordering.copied(build, ground, name)

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        return {}

    def certificate(self, group: Group, sources: int) -> Certificate:
        once = group.route.law == "hard" and group.scale == 1.0
        if once and group.route.top_k == group.experts:
            return Certificate("exact", "all parts of the FFN run, each with the weight 1")
        return Certificate("none", "a token does without some neurons of its FFNs", None)
