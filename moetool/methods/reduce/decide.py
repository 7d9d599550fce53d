"""How prune and merge come to their decisions, in four steps: `replayed`, `statistics`, `choose`,
`solve`. Inside a walk (reduce/solving.py) the last two take turns, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetool import atomic
from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Decisions
from moetool.methods.reduce import ahead, budget, by_router, counts, protect
from moetool.methods.reduce import replay as replaying
from moetool.methods.reduce.asked import Asked, Bounds, Evidence, Settled, tokens_per_expert
from moetool.methods.reduce.decided import Decided
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.facts import Found, TextSeen
from moetool.methods.reduce.options import Reducing
from moetool.methods.reduce.view import View
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture

if TYPE_CHECKING:
    from moetool.forward.stats import Profile

SCIPY_RESERVE = 110_000_000  # the process with numpy and scipy imported, measured
TORCH_RESERVE = 400_000_000  # and with torch


@dataclass(frozen=True)
class Chosen(Decisions):
    """Decisions with what was found out on the way."""

    found: Found = field(default_factory=Found)


def decide(asked: Asked) -> Chosen:
    """Every layer of a model, or what was decided before."""
    replay = replayed(asked)
    if replay is not None:
        writer = asked.way.writer(replay)
        writer.check_walk()
        asked = replace(asked, writer=writer)
        notes = [*_contradiction(asked, replay), *_refit_gone(asked, replay)]
        for note in notes:
            asked.settings.say(note)
        asked = replace(asked, notes=(*asked.notes, *notes))
    if replay is not None and not _reads_more(asked, replay):
        return _chosen(asked, replay, Settled({}), Evidence())
    _check_text(asked, replay)
    if replay is None and asked.kept == asked.mixture.experts:
        return _chosen(asked, _everyone(asked), Settled({}), Evidence())
    if said := ahead.line(asked):
        asked.settings.say(said)
    seen = statistics(asked, replay)
    if asked.options.walks:
        from moetool.methods.reduce.solving import layer_by_layer

        settled = layer_by_layer(asked, seen, bounds(asked, seen, replay), replay)
    else:
        settled = solve(asked, seen, choose(asked, seen, replay))
    if replay is None:
        settled = _with_mtp_layers(asked, settled)
    layers = (dict(replay.layers) if replay else {}) | settled.layers
    refit = _refit(asked)
    made = Decided(asked.verb, asked.way.called, asked.mixture.experts, layers, refit)
    counts.checked_counts(made, asked.mixture)
    return _chosen(asked, made, settled, seen)


def replayed(asked: Asked) -> Decided | None:
    """The decisions of --decisions, checked against this model; None where there are none to
    replay.
    """
    file = asked.options.decisions
    if not file or (asked.settings.dry_run and not Path(file).exists()):
        return None
    return replaying.read(file, asked.verb, asked.way, asked.mixture)


def _contradiction(asked: Asked, replay: Decided) -> list[str]:
    return replaying.contradiction(replay, asked.mixture, asked.options.ratio, Reducing.ratio)


def _refit_gone(asked: Asked, replay: Decided) -> list[str]:
    if asked.options.refit is False:
        return []
    return replaying.without(replay, refits=asked.refits, seed=asked.settings.seed)


def _refit(asked: Asked) -> JsonObject:
    """What a refit is solved on, for whoever replays the decisions."""
    o = asked.options
    if not asked.refits:
        return {}
    on = o.calibrate[0] if len(o.calibrate) == 1 and not o.texts else "text"
    return {"on": on, "tokens": o.tokens, "seq_len": o.seq_len, "seed": asked.settings.seed}


def statistics(asked: Asked, replay: Decided | None) -> Evidence:
    """What is known of the layers before any is decided: a profile that was given, or one made
    now; nothing without text, or where the walk itself will see everything.
    """
    if asked.options.stats:
        from moetool.forward.stats import Profile

        profile = Profile.open(asked.options.stats)
        profile.check_model(asked.mixture.source)
        return evidence(profile, 0)
    if not _profiles(asked, replay):
        return Evidence()
    made = _profiled(asked)
    return evidence(made, made.facts["peak_memory"])


def evidence(profile: Profile, memory: int) -> Evidence:
    """A profile as evidence."""
    data = {k: profile.facts[k] for k in ("tokens", "files", "data_sha256", "seq_len")}
    return Evidence(profile, memory, TextSeen(**data), profile.warnings)


def _profiles(asked: Asked, replay: Decided | None) -> bool:
    """Whether text goes through the model before anything is decided."""
    o = asked.options
    if not o.calibrate:
        return False
    if o.walks:  # the walk sees the layers; before it only super experts and budgets are looked for
        return replay is None and (o.protect or o.budget != "uniform")
    if replay is not None:
        return asked.way.writer(replay).reads(replay)
    return asked.way.needs.text or asked.way.needs.gains or o.protect


def _profiled(asked: Asked) -> Profile:
    from moetool.forward import profile as profiling
    from moetool.forward.stats import Wanted

    o, needs, settings = asked.options, asked.way.needs, asked.settings
    sample = o.sample if needs.sample else 0
    wanted = Wanted(1) if o.walks else Wanted(1, sample, needs.dense, needs.covariance)
    source = asked.mixture.source
    how = profiling.Making(
        asked.work / "stats",
        True,
        asked.way.buffers(asked.mixture),
        settings.memory,
        settings.device,
        settings.tell,
        settings.stop,
    )
    return profiling.make(source, source.folder, asked.calibration(), wanted, how)


def choose(asked: Asked, seen: Evidence, replay: Decided | None) -> Settled:
    """Each layer from statistics, or from weights alone; as it was, where it is replayed."""
    memory = seen.memory or promise(asked)
    if replay is not None:
        return Settled(dict(replay.layers), memory=memory)
    within, profile = bounds(asked, seen, replay), seen.profile

    def view(number: int) -> View:
        stats = profile.layer(number) if profile is not None else None
        return asked.view(number, stats, within.of(number))

    numbers = asked.mixture.layers
    used = {n: tokens_per_expert(profile.layer(n)) for n in numbers} if profile else {}
    layers = {n: asked.way.choose(view(n), within.counts[n]) for n in numbers}
    found = Found(
        within.warnings, protected=within.protected, peaks=within.peaks, tokens_per_expert=used
    )
    return Settled(asked.way.finish(layers, view), found, memory=memory)


def solve(asked: Asked, seen: Evidence, settled: Settled) -> Settled:
    """Down matrices solved where --refit asks for it: on text, or on the sample that a profile kept
    (the layers below unchanged).
    """
    if not asked.refits:
        return settled
    from moetool.methods.reduce.refitting import refit, refit_from

    if asked.options.calibrate:
        return refit(asked, seen, settled)
    return refit_from(asked, seen.profile, settled) if seen.profile is not None else settled


def bounds(asked: Asked, seen: Evidence, replay: Decided | None) -> Bounds:
    """Super experts, and how many experts each layer keeps."""
    if replay is not None:
        return Bounds({})
    uniform = dict.fromkeys(asked.mixture.layers, asked.kept)
    guarded = _guarded(asked, seen, uniform)
    if asked.options.budget == "uniform":
        return guarded
    return replace(guarded, counts=_by_score(asked, seen, guarded))


def _guarded(asked: Asked, seen: Evidence, uniform: dict[int, int]) -> Bounds:
    """Super experts by layer; without text nobody can be found, and the user is told."""
    mixture, profile = asked.mixture, seen.profile
    if not asked.options.protect:
        return Bounds(uniform)
    if profile is None:
        told = "no text: super experts were not looked for (--calibrate FILE finds and keeps them)"
        return Bounds(uniform, None, (told,))
    peaks = protect.found(profile, mixture)
    least = min(asked.kept // mixture.groups, asked.kept)
    stay = {n: e for n, e in protect.by_layer(peaks).items() if len(e) <= least}
    return Bounds(uniform, stay, peaks=peaks)


def _by_score(asked: Asked, seen: Evidence, guarded: Bounds) -> dict[int, int]:
    score, profile = asked.way.scores, seen.profile
    if score is None:
        raise UsageError(
            f"method {asked.way.called!r} has no scores to compare layers by",
            hint=f"--budget uniform, or a method with scores: {', '.join(_scored(asked))}",
        )
    scores = {}
    for n in asked.mixture.layers:
        stats = profile.layer(n) if profile is not None else None
        scores[n] = score(asked.view(n, stats, guarded.of(n)))
    return budget.across(asked.mixture, asked.options.ratio, scores, asked.options.budget)


def _scored(asked: Asked) -> list[str]:
    """Names of the ways whose scores compare layers."""
    known = asked.way.known().values()
    return [way.name for way in known if way(asked.way.verb).scores is not None]


def promise(asked: Asked) -> int:
    """Peak bytes of deciding without a walk; refused when --memory is less."""
    mixture, needs, limit = asked.mixture, asked.way.needs, asked.settings.memory
    needed = SCIPY_RESERVE
    if needs.weights or asked.options.stats:
        layer = max(_layer_bytes(mixture, n) for n in mixture.layers)
        held = (2 if asked.options.stats else 1) * layer + layer // 4
        needed = TORCH_RESERVE + held + asked.way.buffers(mixture)
    if limit is not None and needed > limit:
        raise MoetoolError(
            "deciding does not fit into --memory",
            expected=f"at least {needed:,} bytes",
            found=f"{limit:,} bytes",
            hint="raise --memory, or use a method that reads no weights: prune --method router-distance",
        )
    return needed


def _layer_bytes(mixture: Mixture, layer: int) -> int:
    return sum(c.stored.held for c in mixture.by_layer[layer] if c.kind == "expert")


def _reads_more(asked: Asked, replay: Decided) -> bool:
    """Whether the plan of replayed decisions reads statistics or solved tensors beside the
    model.
    """
    return asked.refits or asked.way.writer(replay).reads(replay)


def _check_text(asked: Asked, replay: Decided | None) -> None:
    """Refuse what needs text and has none."""
    o = asked.options
    wants = asked.way.needs.text or (replay is not None and _reads_more(asked, replay))
    if wants and not o.has_text:
        raise asked.eye.without_text()
    if o.walks and not o.calibrate:
        raise UsageError(
            "--propagate sends text through the model again",
            expected="--calibrate FILE",
            found="--stats",
            hint="a profile was made on the unchanged layers",
        )


def _everyone(asked: Asked) -> Decided:
    """Nothing removed."""
    mixture = asked.mixture
    everyone = Decision.keep(range(mixture.experts))
    layers = dict.fromkeys([*mixture.layers, *mixture.mtp_layers], everyone)
    return Decided(asked.verb, asked.way.called, mixture.experts, layers)


def _with_mtp_layers(asked: Asked, settled: Settled) -> Settled:
    """MTP layers: no text goes through them, so their own router rows decide."""
    numbers = asked.mixture.mtp_layers
    if not numbers:
        return settled
    told = f"{len(numbers)} MTP layers see no text: their experts were chosen by router rows"
    more = {n: Decision.keep(by_router.keep(asked.view(n), asked.kept)) for n in numbers}
    found = replace(settled.found, warnings=(*settled.found.warnings, told))
    return replace(settled, layers=settled.layers | more, found=found)


def _chosen(asked: Asked, made: Decided, settled: Settled, seen: Evidence) -> Chosen:
    """Everything that was decided and found out, and with --dry-run the file of decisions."""
    file, extra = asked.options.decisions, settled.extra
    writer = asked.way.writer(made)
    if not asked.options.walks and writer.reads(made) and (seen.profile is not None):
        stats = str(seen.profile.folder)
        extra = (*extra, *writer.sources(asked.mixture, made, stats, str(asked.work)))
    written = file if _leave(asked, made) else ""
    warnings = dict.fromkeys([*asked.notes, *seen.warnings, *settled.found.warnings])
    found = replace(
        settled.found,
        warnings=tuple(warnings),
        data=settled.found.data or seen.data,
        unsolved=asked.solving.why,
        replayed=file if file and not written else "",
        decisions_written=written,
    )
    return Chosen(made.tables(), {}, settled.memory, made.as_json(), extra, found)


def _leave(asked: Asked, made: Decided) -> bool:
    """With --dry-run, write the decisions where --decisions says, if nothing is there."""
    file = asked.options.decisions
    if not file or not asked.settings.dry_run or Path(file).exists():
        return False
    for name, data in reversed(made.files(Path(file).name).items()):
        atomic.write(Path(file).with_name(name), data)
    return True


def mixture_of(source: Checkpoint) -> Mixture:
    """The experts of a model whose layers all hold as many; MoetoolError for another."""
    mixture = Mixture.of(source)
    if mixture.text_model.calibration:
        raise MoetoolError(
            "the routers of this model have networks that correct their weights, of as many experts",
            file=source.folder,
            expected="a model whose routers are one matrix a layer",
            hint="cut or extend the model it was made from",
        )
    uneven = [n for n in mixture.layers if mixture.count_in(n) != mixture.experts]
    if uneven:
        raise MoetoolError(
            "the layers of this model already hold different numbers of experts",
            file=source.folder,
            tensor=f"layer {uneven[0]}",
            expected=mixture.experts,
            found=mixture.count_in(uneven[0]),
            hint="cut the model it was made from",
        )
    return mixture
