"""The options that prune and merge share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moetool.errors import UsageError
from moetool.forward.drawn import OWN
from moetool.methods.field import WHAT, Field
from moetool.methods.options import Gate, Served, Solving, Storing, Text, option

BUDGETS = ("uniform", "sensitivity", "global")
DRAWN_TOKENS = 16_384  # of a calibration without text
# told, these mean text: they are refused alone, as ever
LOOKS = ("calibrate", "stats", "text_field", "trust_remote_code")
UNEVEN = ("auto", "uniform", "zeroed", "ghost", "ragged")


@dataclass(frozen=True)
class What:
    """Which experts go, and how the result is written."""

    ratio: float = option(
        0.25,
        "share of the experts removed: 0.25 turns 128 into 96",
        WHAT,
        unit="share",
        metavar="SHARE",
    )
    method: str = option("auto", "", WHAT)  # each verb says its own
    decisions: str = option(
        "",
        "replay decisions from this file; with --dry-run, write them there if it does not exist",
        WHAT,
        metavar="FILE",
    )
    budget: str = option(
        "uniform",
        "experts kept: uniform; or the same total, more where they are needed: sensitivity (by "
        "each expert's share of its layer's scores) or global (by the scores of all layers "
        "together)",
        WHAT,
        choices=BUDGETS,
    )
    uneven: str = option(
        "auto",
        "how layers with different numbers of experts are written: ragged (small, model type "
        "moetool: transformers loads it with moetool installed), ghost (padded to as many, exact "
        "where the router has a selection bias), zeroed (loads everywhere, saves nothing), uniform "
        "(refused), or auto: ragged, and for clients of --for that do not read it ghost where it "
        "is exact",
        WHAT,
        choices=UNEVEN,
        was="layout",  # until 1.0
    )
    protect: bool = option(True, "keep super experts whatever their score", WHAT)


@dataclass(frozen=True)
class Reducing(Storing, Served, Gate, Solving, Text, What):
    """Everything that prune and merge are told, but for what only one of them knows."""

    def __post_init__(self) -> None:
        self._check_amounts()
        self._check_texts()

    @property
    def has_text(self) -> bool:
        """Whether there is text, or what text showed."""
        return bool(self.calibrate or self.stats)

    @property
    def walks(self) -> bool:
        """Whether layers are decided inside a walk, each after those below it were changed."""
        return self.propagate

    def _check_amounts(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise UsageError(
                "--ratio is the share of experts removed",
                expected="0 <= ratio < 1, for example 0.25",
                found=self.ratio,
                hint="0.25 turns 128 experts into 96",
            )
        if self.budget != "uniform" and self.uneven == "uniform":
            raise UsageError(
                f"--budget {self.budget} keeps other numbers of experts in each layer, and --uneven uniform cannot hold them",
                expected="--uneven auto, zeroed, ghost or ragged",
                hint="leave out --uneven uniform",
            )
        if not 0.0 <= self.own_share < 1.0:
            raise UsageError(
                "--own-share is the share of a refit's tokens that are no text",
                expected="0 <= share < 1, for example 0.4",
                found=self.own_share,
                hint="0 solves on text alone; --calibrate own on no text at all",
            )
        self.check_gate()

    def _check_texts(self) -> None:
        self.check_one_text()
        if self.gated and not (self.text or self.texts):
            raise UsageError(
                "a gate needs text to measure on",
                expected="--text FILE or --calibrate FILE",
                hint="give held-out text: --text test.jsonl",
            )
        if self.refit and not self.has_text and not self.decisions:
            raise UsageError("--refit needs text", hint="--calibrate FILE")
        self._check_own_share()

    def _check_own_share(self) -> None:
        """Refuse a share that no refit would take."""
        if self.own_share in (0.0, type(self).own_share):
            return
        drawn = len(self.texts) < len(self.calibrate)
        if drawn or self.stats or self.refit is False or not self.calibrate:
            raise UsageError(
                "--own-share is a share beside text, where --refit solves on that",
                expected="--calibrate FILE alone, without own, random, --stats or --no-refit",
                found=self.own_share,
                hint="leave out --own-share; --calibrate FILE --calibrate own:0.2 is a mix of its own",
            )


def without_text(
    values: Mapping[str, object], drawn: str = OWN, *, moved: bool = False
) -> Mapping[str, object]:
    """What a verb was told; where it has the choice of the method and was given nothing to look
    at, with what the model writes itself, or with random token ids. `moved`: it replays decisions
    that only move experts, and needs neither.
    """
    looks = any(values.get(name) for name in LOOKS)
    if looks or values.get("method", "auto") != "auto" or moved:
        return values
    return {"tokens": DRAWN_TOKENS, **values, "calibrate": (drawn,)}


@dataclass(frozen=True)
class Renamed:
    """Options under the words of today, and a note for each old one."""

    values: dict[str, object]
    notes: tuple[str, ...]


def renamed(values: Mapping[str, object], known: Iterable[Field]) -> Renamed:
    """Old words replaced; UsageError where an old and its new one say different things."""
    today = {f.was: f.name for f in known if f.was}
    clean: dict[str, object] = {}
    notes = []
    for key, value in values.items():
        name = key.replace("-", "_")
        new = today.get(name, name)
        if new in clean and clean[new] != value:
            raise UsageError(
                f"--{name} and --{new} say different things",
                found=f"{clean[new]}, {value}",
                hint=f"give --{new} alone",
            )
        if new != name:
            notes.append(f"--{name} is called --{new} now; the old word goes with 1.0")
        clean[new] = value
    return Renamed(clean, tuple(notes))
