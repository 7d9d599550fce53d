"""What is to be decided, and what is known on the way: the values that the steps of deciding hand
on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetool.methods.contract import Settings
from moetool.methods.options import Text
from moetool.methods.reduce import budget
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.facts import Found, TextSeen
from moetool.methods.reduce.options import Reducing
from moetool.methods.reduce.protect import Peak
from moetool.methods.reduce.view import Eye, View
from moetool.methods.reduce.way import Way
from moetool.methods.reduce.whether import Whether, whether
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture

if TYPE_CHECKING:
    from moetool.forward.batches import Batches
    from moetool.forward.profile import Calibration
    from moetool.forward.stats import LayerStats, Profile


OWN_LENGTH = 256  # tokens of a sequence of what stands beside text in a refit


@dataclass(frozen=True)
class Asked:
    """What is to be decided: which verb, which way, of which model."""

    verb: str
    way: Way
    mixture: Mixture
    settings: Settings
    notes: tuple[str, ...] = ()  # warnings that stand before anything is looked at
    writer: Way | None = None  # who writes the decisions that are replayed

    @property
    def options(self) -> Reducing:
        return self.way.options

    @cached_property
    def kept(self) -> int:
        """Experts of a layer that stay when all layers keep as many."""
        return budget.uniform(self.mixture, self.options.ratio)

    @cached_property
    def solving(self) -> Whether:
        """Whether down matrices are solved again, or why not."""
        return whether(self.writer or self.way, self.mixture, self.kept)

    @property
    def refits(self) -> bool:
        """Whether down matrices are solved again."""
        return self.solving.refits

    @property
    def work(self) -> Path:
        """Where deciding leaves what it has done; beside the output, removed with its success."""
        return Path(self.settings.work)

    @cached_property
    def eye(self) -> Eye:
        settings = self.settings
        return Eye(
            self.way.called,
            self.options.sample,
            self.textless,
            settings.seed,
            settings.device,
        )

    @property
    def textless(self) -> tuple[str, ...]:
        """The ways that need no text."""
        return tuple(n for n, way in self.way.known().items() if not way.needs.text)

    def view(
        self, layer: int, stats: LayerStats | None = None, protected: tuple[int, ...] = ()
    ) -> View:
        """A layer as the way sees it."""
        return View(self.mixture, layer, self.eye, stats, protected)

    def calibration(self) -> Calibration:
        """The calibration text as forward/profile.py takes it."""
        return calibration(self.options, self.settings)

    def solved_on(self) -> Batches:
        """What --refit solves on: --refit-tokens of the text, and --own-share of them of no text,
        what the model writes itself or, where it does not fit into memory, random ids.
        """
        from moetool.forward import drawn, own
        from moetool.forward.batches import joined

        o, source = self.options, self.mixture.source
        share = o.own_share if len(o.texts) == len(o.calibrate) else 0.0
        text = self.calibration().read(source).spread(round((1.0 - share) * o.refit_tokens))
        tokens = round(text.total * share / (1.0 - share))
        if tokens < 2:
            return text
        name = drawn.OWN if own.fits(source, self.settings.memory) else drawn.RANDOM
        told = self.calibration()
        cut = replace(told.cut, tokens=tokens, seq_len=min(OWN_LENGTH, text.seq_len))
        return joined(text, replace(told, specs=(name,), cut=cut).read(source))


def calibration(o: Text, s: Settings) -> Calibration:
    """The text that options name, as forward/profile.py takes it."""
    from moetool.forward.batches import Cut
    from moetool.forward.own import Running
    from moetool.forward.profile import Calibration

    cut = Cut(o.tokens, o.seq_len, o.pack, True, s.seed, o.batch_tokens)
    running = Running(s.memory, s.device, s.tell, s.stop)
    told = Calibration(o.calibrate, cut, o.text_field, o.trust_remote_code)
    return replace(told, running=running)


@dataclass(frozen=True)
class Evidence:
    """What text, or a profile, showed. `memory`: promised peak of the walk that made it."""

    profile: Profile | None = None
    memory: int = 0
    data: TextSeen | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """How many experts each layer keeps, who stays whatever its score (None: nobody looked), and
    whose outputs were the largest.
    """

    counts: Mapping[int, int]
    protected: Mapping[int, list[int]] | None = None
    warnings: tuple[str, ...] = ()
    peaks: tuple[Peak, ...] = ()

    def of(self, layer: int) -> tuple[int, ...]:
        """Protected experts of a layer."""
        return tuple((self.protected or {}).get(layer, ()))


@dataclass(frozen=True)
class Settled:
    """All layers decided; `extra` are tensors that were solved for."""

    layers: dict[int, Decision]
    found: Found = field(default_factory=Found)
    extra: tuple[Checkpoint, ...] = ()
    memory: int = 0


def tokens_per_expert(stats: Any) -> list[int]:
    """How many tokens of the text each expert saw."""
    return [int(c) for c in stats.total("count")]
