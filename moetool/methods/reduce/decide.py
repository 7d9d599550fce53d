"""How prune and merge come to their decisions: from weights alone, from a profile, or in a walk of
their own, layer by layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Decisions, Settings
from moetool.methods.reduce import budget, protect
from moetool.methods.reduce import decision as deciding
from moetool.methods.reduce.cut import LAYOUTS
from moetool.methods.reduce.decision import Decided, Layer
from moetool.methods.reduce.view import View
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture

SCIPY_RESERVE = 110_000_000  # the process with numpy and scipy imported, measured
TORCH_RESERVE = 400_000_000  # and with torch


def option(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Reduction:
    """The options that prune and merge share."""

    ratio: float = option(0.25, "share of the experts removed: 0.25 turns 128 into 96")
    calibrate: str = option(
        "",
        "text to calibrate on: FILE[:SHARE] (.txt, .jsonl, .parquet), a Hub dataset, or - for standard input; repeat it",
    )
    stats: str = option("", "a profile made by `moetool profile`, instead of --calibrate")
    tokens: int = option(262_144, "tokens of calibration text")
    seq_len: int = option(2048, "tokens of a sequence")
    pack: bool = option(
        True, "join documents and cut them into whole sequences; --no-pack: one sequence a document"
    )
    text_field: str = option("", "field of .jsonl and .parquet that holds the text")
    batch_tokens: int = option(4096, "tokens that go through a layer at once")
    sample: int = option(2048, "tokens of a layer kept for methods that run all experts")
    decisions: str = option(
        "", "replay decisions from this file; with --dry-run, write them there if it does not exist"
    )
    budget: str = option(
        "uniform",
        "experts kept: uniform, or sensitivity (the same total, more where they are needed)",
    )
    layout: str = option("uniform", "for other numbers in each layer: zeroed, ghost or ragged")
    protect: bool = option(
        True, "keep super experts whatever their score; --no-protect to switch off"
    )
    propagate: bool = option(False, "look at each layer with the layers below it already changed")
    refit: bool = option(
        False,
        "solve down_proj of the kept experts again, so that each layer's output stays as near as it can",
    )
    refit_tokens: int = option(32_768, "tokens of a layer that --refit solves on")
    max_kl: float = option(
        0.0,
        "fail with exit code 4, and write nothing that loads, when the KL divergence from the source is larger (0: no gate)",
    )
    max_perplexity_increase: str = option("", "the same for perplexity, for example 2%")
    text: str = option(
        "", "held-out text for the gate and the report; default for the gate: the calibration text"
    )
    text_tokens: int = option(32_768, "tokens of --text")

    def _check(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise UsageError(
                "--ratio is the share of experts removed",
                expected="0 <= ratio < 1, for example 0.25",
                found=self.ratio,
                hint="0.25 turns 128 experts into 96",
            )
        if self.calibrate and self.stats:
            raise UsageError(
                "--calibrate and --stats exclude each other",
                hint="a profile holds what calibration would see: give one of them",
            )
        if self.budget not in budget.KINDS:
            raise UsageError(
                f"--budget {self.budget!r} is not known",
                expected=" or ".join(budget.KINDS),
                hint="leave it out",
            )
        if self.layout not in LAYOUTS:
            raise UsageError(
                f"--layout {self.layout!r} is not known",
                expected=", ".join(LAYOUTS),
                hint="leave it out",
            )
        if self.budget == "sensitivity" and self.layout == "uniform":
            raise UsageError(
                "--budget sensitivity keeps other numbers of experts in each layer, and --layout uniform cannot hold them",
                expected="--layout zeroed, ghost or ragged",
                hint="zeroed loads everywhere and saves nothing; ghost is exact where the router has a selection bias; ragged is small, but no stock loader reads it",
            )
        if (
            min(self.tokens, self.batch_tokens, self.refit_tokens, self.text_tokens) < 1
            or self.seq_len < 2
        ):
            raise UsageError(
                "--tokens, --batch-tokens, --refit-tokens and --text-tokens are at least 1, --seq-len at least 2",
                hint="leave them out",
            )
        if self.max_kl < 0:
            raise UsageError(
                "--max-kl is not negative", found=self.max_kl, hint="for example --max-kl 0.05"
            )
        if (parse_percent(self.max_perplexity_increase) is not None or self.max_kl > 0) and not (
            self.text or self.calibrate
        ):
            raise UsageError(
                "a gate needs text to measure on",
                expected="--text FILE or --calibrate FILE",
                hint="give held-out text: --text test.jsonl",
            )
        if self.refit and not self.calibrate and not self.decisions and not self.stats:
            raise UsageError("--refit needs text", hint="--calibrate FILE")

    @property
    def gated(self) -> bool:
        return self.max_kl > 0 or bool(self.max_perplexity_increase)

    def calibration(self, seed: int) -> Any:
        """The calibration text as forward/profile.py takes it."""
        from moetool.forward.batches import Cut
        from moetool.forward.profile import Calibration

        return Calibration(
            specs(self.calibrate),
            Cut(self.tokens, self.seq_len, self.pack, True, seed, self.batch_tokens),
            self.text_field,
        )


def specs(text: str) -> tuple[str, ...]:
    """`a.jsonl,b.jsonl:0.3` -> its files."""
    return tuple(filter(None, text.split(",")))


def parse_percent(text: str) -> float | None:
    """`2%` -> 0.02, `0.02` -> 0.02, empty -> None; UsageError otherwise."""
    if not text:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if not found or len(found[1]) > 9:
        raise UsageError(f"{text[:60]!r} is not a percentage", hint="write it like 2%")
    return float(found[1]) / (100 if found[2] else 1)


# What a verb gives the frame: the decision of a layer (view, experts to keep).
Choose = Callable[[View, int], Layer]


@dataclass
class Job:
    """One decision in the making. `text`: statistics are needed; `wanted`: which; `rebuild` makes
    the new block (refit, propagation).
    """

    options: Reduction
    verb: str
    method: str
    source: Checkpoint
    settings: Settings
    choose: Choose
    text: bool
    sample: int
    dense: bool = False
    covariance: bool = False
    weights: bool = False  # reads all weights of a layer, with or without text
    buffers: int = 0  # bytes that deciding a layer holds beside its block
    rebuild: Callable[[View, Layer, Any, int], tuple[Any, dict[str, Any]]] | None = None
    scores: Callable[[View], Any] | None = None  # for sensitivity budgets
    finish: Callable[[dict[int, Layer], Callable[[int], View]], dict[int, Layer]] | None = (
        None  # once all layers are decided
    )
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mixture = Mixture.of(self.source)
        uneven = [
            n for n in self.mixture.layers if self.mixture.count_in(n) != self.mixture.experts
        ]
        if uneven:
            raise MoetoolError(
                "the layers of this model already hold different numbers of experts",
                file=self.source.folder,
                tensor=f"layer {uneven[0]}",
                expected=self.mixture.experts,
                found=self.mixture.count_in(uneven[0]),
                hint="cut the model it was made from",
            )

    @property
    def walks(self) -> bool:
        """Whether layers are decided inside the walk."""
        return self.options.propagate or (self.options.refit and bool(self.options.calibrate))

    def run(self) -> Decisions:
        """Decide every layer, or replay what was decided."""
        options, replay = self.options, self._replayed()
        if replay is not None and not self._reads_more(replay):
            return self._decisions(replay, (), 0)
        self._check_text(replay)
        self.kept = budget.uniform(self.mixture, options.ratio)
        if replay is None and self.kept == self.mixture.experts:
            everyone = Layer.keep(range(self.mixture.experts))
            return self._decisions(
                Decided(
                    self.verb,
                    self.method,
                    self.mixture.experts,
                    dict.fromkeys([*self.mixture.layers, *self.mixture.mtp_layers], everyone),
                ),
                (),
                0,
            )
        profile, memory = self._profile(replay)
        layers, extra, memory = self._decide(
            profile, memory or self._promise(), dict(replay.layers) if replay else {}
        )
        if replay is None:
            layers |= self._mtp_layers()
        decided = Decided(self.verb, self.method, self.mixture.experts, layers)
        deciding.checked_counts(decided, self.mixture)
        self._leave(decided)
        if self.covariance and profile is not None and not extra:
            extra = (stats_source(profile.folder),)
        return self._decisions(decided, extra, memory)

    def _decide(
        self, profile: Any, memory: int, replay: dict[int, Layer]
    ) -> tuple[dict[int, Layer], tuple[Checkpoint, ...], int]:
        """(layers, solved tensors, promised peak): inside a walk, from statistics, or as they were."""
        if self.walks:
            return self._walk(profile, replay)
        layers = replay or self._from(profile)
        return (
            layers,
            self._refit_from(profile, layers) if self.options.refit and profile is not None else (),
            memory,
        )

    def _promise(self) -> int:
        """Peak bytes of deciding without a walk; refused when --memory is less."""
        needed = SCIPY_RESERVE
        if self.weights or self.options.stats:
            layer = max(
                sum(c.stored.held for c in self.mixture.by_layer[n] if c.kind == "expert")
                for n in self.mixture.layers
            )
            needed = (
                TORCH_RESERVE + (2 if self.options.stats else 1) * layer + layer // 4 + self.buffers
            )
        if self.settings.memory is not None and needed > self.settings.memory:
            raise MoetoolError(
                "deciding does not fit into --memory",
                expected=f"at least {needed:,} bytes",
                found=f"{self.settings.memory:,} bytes",
                hint="raise --memory, or use a method that reads no weights: prune --method router-distance",
            )
        return needed

    def _replayed(self) -> Decided | None:
        """The decisions of --decisions, checked against this model; None where there are none to
        replay.
        """
        file = self.options.decisions
        if not file or (self.settings.dry_run and not Path(file).exists()):
            return None
        decided = deciding.read(file)
        decided.check(self.mixture, file)
        deciding.checked_counts(decided, self.mixture)
        self.facts["replayed"] = file
        return decided

    def _reads_more(self, replay: Decided) -> bool:
        """Whether the plan of replayed decisions reads statistics or solved tensors beside the
        model.
        """
        return (
            self.options.refit
            or self.covariance
            or any(layer.constant or layer.sparsity for layer in replay.layers.values())
        )

    def _check_text(self, replay: Decided | None) -> None:
        """Refuse what needs text and has none."""
        options = self.options
        if (
            (self.text or (replay is not None and self._reads_more(replay)))
            and not options.calibrate
            and not options.stats
        ):
            raise UsageError(
                f"method {self.method!r} needs text",
                expected="--calibrate FILE or --stats DIR",
                found="neither",
                hint="or a method without text: --method router-distance",
            )
        if self.walks and not options.calibrate:
            raise UsageError(
                "--propagate sends text through the model again",
                expected="--calibrate FILE",
                found="--stats",
                hint="a profile was made on the unchanged layers",
            )

    def _leave(self, decided: Decided) -> None:
        """With --dry-run, write the decisions where --decisions says, if nothing is there."""
        file = self.options.decisions
        if file and self.settings.dry_run and not Path(file).exists():
            Path(file).write_text(deciding.render(decided.as_json()))
            self.facts["decisions_written"] = file

    def _decisions(self, decided: Decided, extra: tuple[Checkpoint, ...], memory: int) -> Decisions:
        return Decisions(
            decided.tables(),
            {"warnings": self.warnings, **self.facts},
            memory,
            decided.as_json(),
            extra,
        )

    def _profile(self, replay: Decided | None) -> tuple[Any, int]:
        """The statistics, given or made; None without text, or where the walk itself will see
        everything.
        """
        options = self.options
        from_text = options.calibrate and not (
            self.walks
            and (replay is not None or (not options.protect and options.budget == "uniform"))
        )
        if options.stats:
            from moetool.forward.stats import Profile

            profile = Profile.open(options.stats)
            profile.check_model(self.source.fingerprint(), self.source.folder)
            self.warnings += [w for w in profile.facts["warnings"] if w not in self.warnings]
            self.facts["data"] = {
                k: profile.facts[k] for k in ("tokens", "files", "data_sha256", "seq_len")
            }
            return profile, 0
        if not from_text or (
            replay is None and not self.text and not self.walks and not options.protect
        ):
            return None, 0
        from moetool.forward import profile as profiling
        from moetool.forward.stats import Wanted

        sample = (
            0
            if self.walks
            else max(self.sample and options.sample, options.refit_tokens if options.refit else 0)
        )
        made = profiling.make(
            self.source,
            self.source.folder,
            self.work / "stats",
            options.calibration(self.settings.seed),
            Wanted(1, sample, self.dense and not self.walks, self.covariance and not self.walks),
            replace=True,
            buffers=self.buffers,
            memory=self.settings.memory,
            device=self.settings.device,
            tell=self.settings.tell,
            stop=self.settings.stop,
        )
        self.warnings += made.facts["warnings"]
        self.facts["data"] = {
            k: made.facts[k] for k in ("tokens", "files", "data_sha256", "seq_len")
        }
        return made, made.facts["peak_memory"]

    @property
    def work(self) -> Path:
        """Where a walk leaves what it has done; beside the output, removed with its success."""
        return Path(self.settings.work)

    def _from(self, profile: Any) -> dict[int, Layer]:
        """Decide every layer from statistics (or without)."""
        guarded = self._guarded(profile)
        counts = self._counts(profile, guarded)
        if profile is not None:
            self.facts["tokens_per_expert"] = {
                str(n): tokens_per_expert(profile.layer(n)) for n in self.mixture.layers
            }
        layers = {
            n: self.choose(self._view(n, profile, guarded), counts[n]) for n in self.mixture.layers
        }
        return (
            self.finish(layers, lambda n: self._view(n, profile, guarded))
            if self.finish
            else layers
        )

    def _view(self, number: int, profile: Any, guarded: dict[int, list[int]]) -> View:
        return View(
            self.mixture,
            number,
            self.options,
            self.settings.seed,
            profile.layer(number) if profile is not None else None,
            tuple(guarded.get(number, ())),
            self.settings.device,
        )

    def _guarded(self, profile: Any) -> dict[int, list[int]]:
        """Super experts by layer; without text nobody can be found, and the user is told."""
        if not self.options.protect:
            return {}
        if profile is None:
            self.warnings.append(
                "no text: super experts were not looked for (--calibrate FILE finds and keeps them)"
            )
            return {}
        found = protect.super_experts(
            {n: profile.layer(n).max_out for n in self.mixture.layers},
            int(self.mixture.layout.field("layers", self.mixture.text_model.config)),
        )
        least = min(self.kept // self.mixture.groups, self.kept)
        found = {n: e for n, e in found.items() if len(e) <= least}
        self.facts["protected"] = {str(n): e for n, e in found.items()}
        return found

    def _counts(self, profile: Any, guarded: dict[int, list[int]]) -> dict[int, int]:
        if self.options.budget == "uniform":
            return dict.fromkeys(self.mixture.layers, self.kept)
        if self.scores is None:
            raise UsageError(
                f"method {self.method!r} has no scores to compare layers by",
                hint="--budget uniform, or a method with scores: reap, frequency, gate-mass, ean, easy-ep",
            )
        return budget.by_sensitivity(
            self.mixture,
            self.options.ratio,
            {n: self.scores(self._view(n, profile, guarded)) for n in self.mixture.layers},
        )

    def _mtp_layers(self) -> dict[int, Layer]:
        """MTP layers: no text goes through them, so their own router rows decide."""
        if not self.mixture.mtp_layers:
            return {}
        from moetool.methods.prune.router_distance import RouterDistance

        self.warnings.append(
            f"{len(self.mixture.mtp_layers)} MTP layers see no text: their experts were chosen by router rows"
        )
        return {
            n: RouterDistance().decide(
                View(self.mixture, n, self.options, self.settings.seed), self.kept
            )
            for n in self.mixture.mtp_layers
        }

    def _walk(
        self, profile: Any, replay: dict[int, Layer]
    ) -> tuple[dict[int, Layer], tuple[Checkpoint, ...], int]:
        """Decide inside the walk: each layer is looked at, changed, and passed again before the
        next one is.
        """
        from moetool.methods.reduce.inwalk import walk

        guarded = self._guarded(profile) if profile is not None else {}
        counts = self._counts(profile, guarded)
        return walk(self, guarded, counts, replay)

    def _refit_from(self, profile: Any, layers: dict[int, Layer]) -> tuple[Checkpoint, ...]:
        """Refit on the sample that a profile kept (the layers below unchanged)."""
        from moetool.methods.reduce.inwalk import refit_layer, solved_source

        folder = self.work / "solved"
        for number, layer in layers.items():
            view = self._view(number, profile, {})
            refit_layer(self, view, layer, view.block, view.sample, folder)
        return solved_source(folder)


def tokens_per_expert(stats: Any) -> list[int]:
    """How many tokens of the text each expert saw."""
    return [int(c) for c in stats.total("count")]


def stats_source(folder: Path) -> Checkpoint:
    """A profile's layer files as a source of tensors (`LAYER.name`)."""
    return parts_source(folder, "layer-*.safetensors")


def parts_source(folder: Path, pattern: str) -> Checkpoint:
    """Loose safetensors files as a source of tensors."""
    from moetool.surgery.checkpoint import read_header

    tensors, files = {}, {}
    for path in sorted(folder.glob(pattern)):
        stored, seal, size = read_header(path)
        files[path.name] = (size, seal)
        tensors |= {t.name: t for t in stored}
    return Checkpoint(str(folder), {}, tensors, files)


def removed(mixture: Mixture, layers: Sequence[Layer]) -> dict[str, Any]:
    """For the report: experts before and after, and the share that went."""
    counts = sorted({layer.count for layer in layers})
    total = sum(layer.count for layer in layers)
    return {
        "experts_before": mixture.experts,
        "experts_after": counts[0] if len(counts) == 1 else counts,
        "removed_share": 1.0 - total / (mixture.experts * len(layers)),
    }


def refuse_quantized(mixture: Mixture, why: str) -> None:
    """Merging and sending text need float experts."""
    if not mixture.plain:
        raise MoetoolError(
            f"{why} needs experts in floating point",
            file=mixture.source.folder,
            found="quantized experts",
            expected="float weights",
            hint="prune without text works on quantized experts: --method router-distance",
        )
