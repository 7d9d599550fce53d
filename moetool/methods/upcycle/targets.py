"""Which family the result is written as: of those that lose nothing the one that works in most
clients, or a sentence for each that would.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moetool.data import JsonObject
from moetool.errors import MoetoolError, did_you_mean
from moetool.methods import site
from moetool.methods.options import CLIENTS
from moetool.methods.works import said
from moetool.surgery import groups
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.clients import Judged
from moetool.surgery.layout import DATA, Layout, Matched, families
from moetool.surgery.pair import Pair, pairs
from moetool.surgery.sites import CannotHold


@dataclass(frozen=True)
class Conversion:
    """Source and target family of the text model; `outer` is the multimodal family around it,
    `prefix` its name prefix.
    """

    pair: Pair
    source: Layout
    target: Layout
    config: JsonObject
    outer: Pair | None = None
    prefix: str = ""

    def match(self, name: str) -> Matched | None:
        """Which slot of the source's text model a name in the file fills."""
        if not name.startswith(self.prefix):
            return None
        return self.source.match(name.removeprefix(self.prefix))

    @property
    def stays_dense(self) -> bool:
        """No experts anywhere: the result is of the source's own family."""
        return self.pair.source == self.pair.target and self.pair.inner is None


@dataclass(frozen=True)
class Spelling:
    """A conversion, and how its experts will lie."""

    conversion: Conversion
    fused: bool


Judge = Callable[[Spelling], Sequence[Judged]]


@dataclass(frozen=True)
class Tried:
    """A spelling as clients judge it: why it does not work in those that are named, and in how many
    of all it works without a condition.
    """

    spelling: Spelling
    useless: list[str]
    worth: int

    @classmethod
    def of(cls, spelling: Spelling, found: Sequence[Judged], wish: Wish) -> Tried:
        named = [one for one in found if one.client in wish.serves]
        useless = [f"{one.client} {said(one)}" for one in named if not one.works]
        return cls(spelling, useless, sum(one.works and not one.why for one in found))


@dataclass(frozen=True)
class Wish:
    """What the target must be able to hold, and the clients in which it must work (`serves`)."""

    target: str
    layout: str
    layers: str
    shared: bool
    split: int
    top_k: int
    width: int
    count: int
    serves: tuple[str, ...] = ()


def dense(source: Checkpoint) -> Conversion:
    """The source's own family, for recipes that only mix trunks."""
    model_type = str(source.config.get("model_type"))
    layout = Layout.load(model_type)
    return Conversion(Pair(model_type, model_type), layout, layout, source.config)


def candidates(source: Checkpoint) -> list[Conversion]:
    """Every conversion there is data for; MoetoolError when the family is unknown or is not dense."""
    model_type = source.config.get("model_type")
    if not isinstance(model_type, str):
        raise MoetoolError(
            "the config names no model_type",
            file=f"{source.folder}/config.json",
            found=model_type,
            hint="restore config.json from the original model",
        )
    model_type = groups.family_of(source.config)
    layout = Layout.load(model_type)
    found = []
    for pair in pairs():
        if pair.source != model_type:
            continue
        if pair.inner is None:
            found.append(Conversion(pair, layout, Layout.load(pair.target), source.config))
            continue
        inner_source, _, inner_target = pair.inner.partition("--")
        text = source.config.get("text_config") or {}
        if text.get("model_type", inner_source) == inner_source:
            inner = next(p for p in pairs() if (p.source, p.target) == (inner_source, inner_target))
            found.append(
                Conversion(
                    inner,
                    Layout.load(inner_source),
                    Layout.load(inner_target),
                    text,
                    pair,
                    pair.prefix,
                )
            )
    if not found:
        raise MoetoolError(
            f"no conversion from {model_type} to a mixture of experts",
            file=source.folder,
            expected=f"one of {', '.join(sorted({p.source for p in pairs()}))}",
            hint=why_not(layout),
        )
    return found


def why_not(layout: Layout) -> str:
    """Why a family has no conversion: for each near candidate what would be lost
    (archs/near_misses.json), or one plain sentence.
    """
    near = json.loads((DATA / "near_misses.json").read_text()).get(layout.model_type)
    if near:
        return "; ".join(f"not {target}: {why}" for target, why in near.items())
    if layout.kind == "moe":
        return f"{layout.model_type} already has experts: prune, merge and convert-layout are for those"
    return f"no class in transformers has {layout.model_type}'s block around a mixture of experts; see `moetool archs show {layout.model_type}`"


def gap(source: Layout, target: Layout) -> str:
    """What keeps two families apart, read off their layouts: trunk tensors that one has and the
    other lacks.
    """

    def trunk(layout: Layout) -> set[str]:
        text = (s for s in layout.tensors if layout.in_text(s))
        return {s.name for s in text if s.role is None and s.when is None}

    def short(names: set[str]) -> list[str]:
        return sorted(n.rpartition("{layer}.")[2] for n in names)

    ours, theirs = trunk(source), trunk(target)
    needs, lacks = short(theirs - ours), short(ours - theirs)
    parts = []
    if needs:
        missing = ", ".join(needs[:4])
        parts.append(f"{target.model_type} needs {missing}, which {source.model_type} has not")
    if lacks:
        parts.append(f"{target.model_type} has no place for {', '.join(lacks[:4])}")
    same = "their tensors have the same names, but nobody has shown that"
    return "; ".join(parts) or f"{same} {target.model_type} computes the same"


def refusals(conversion: Conversion, wish: Wish) -> list[str]:
    """Why a conversion cannot give what is wished; empty when it can."""
    target = conversion.target
    found = list(conversion.pair.refusals(conversion.source, conversion.config))
    layers = site.parse(wish.layers, wish.count)
    try:
        target.overlay.sites.fields(layers, wish.count, wish.width)
    except CannotHold as problem:
        found.append(f"{target.model_type} {problem}")
    if wish.shared and not target.overlay.shared:
        found.append(f"{target.model_type} has no shared expert")
    if wish.layout == "per-expert" and not (
        target.per_expert() and target.experts.reads_per_expert
    ):
        found.append(
            f"{target.model_type} reads stacked experts only: per-expert names would load as random experts (use --layout fused)"
        )
    if wish.layout == "fused" and not target.fused():
        found.append(f"{target.model_type} has no stacked form")
    if target.overlay.law.score == "sparsemixer" and (
        wish.split > 1 or (wish.top_k != 2 and not wish.shared)
    ):
        found.append(
            f"{target.model_type} always runs two experts with weight 1 each (--top-k 2, no --split)"
        )
    return found


def choose(source: Checkpoint, wish: Wish, judge: Judge) -> Spelling:
    """The wished conversion, or with `auto` the one that works in most clients of those that fit
    (the first of several); MoetoolError with a reason for each that does not. `judge`: what clients
    make of one.
    """
    found = named(source, wish)
    reasons = {c.pair.target: refusals(c, wish) for c in found}
    fitting = [c for c in found if not reasons[c.pair.target]]
    if len(fitting) == 1 and not wish.serves:
        return _spellings(fitting[0], wish)[0]
    able: list[tuple[int, Spelling]] = []
    for conversion in fitting:
        tried = [Tried.of(one, judge(one), wish) for one in _spellings(conversion, wish)]
        good = next((one for one in tried if not one.useless), None)
        if good is not None:
            able.append((good.worth, good.spelling))
        reasons[conversion.pair.target] = tried[0].useless
    if able:
        return max(able, key=lambda one: one[0])[1]
    lines = {target: "; ".join(why) for target, why in reasons.items()}
    where = f" and works in {', '.join(wish.serves)}" if wish.serves else ""
    raise MoetoolError(
        f"no target can hold {source.config.get('model_type')} without loss{where}",
        file=source.folder,
        **{f"not {t}": w for t, w in lines.items()},
        hint=_another(source, wish, judge)
        or _next_step(reasons, str(source.config.get("model_type"))),
    )


def _another(source: Checkpoint, wish: Wish, judge: Judge) -> str:
    """What to do where a target was named that does not work in the clients of --for, and another
    does.
    """
    if wish.target == "auto" or not wish.serves:
        return ""
    try:
        found = choose(source, replace(wish, target="auto"), judge).conversion
    except MoetoolError:
        return ""
    named = (found.outer or found.pair).target
    return f"--target auto takes {named}, which works in {', '.join(wish.serves)}"


def named(source: Checkpoint, wish: Wish) -> list[Conversion]:
    """The conversions that --target means."""
    options = candidates(source)
    named = [
        c for c in options if wish.target in ("auto", (c.outer or c.pair).target, c.pair.target)
    ]
    if named:
        return named
    known = sorted({c.pair.target for c in options})
    hint = did_you_mean(wish.target, [*known, "auto"])
    if wish.target in families()["moe"]:
        hint = f"{gap(options[0].source, Layout.load(wish.target))}; use --target auto"
    raise MoetoolError(
        f"no exact conversion from {source.config.get('model_type')} to {wish.target}",
        expected=", ".join(known),
        found=wish.target,
        hint=hint,
    )


def _spellings(conversion: Conversion, wish: Wish) -> list[Spelling]:
    """How the experts may lie, what most clients read first."""
    target = conversion.target
    single = bool(target.per_expert()) and target.experts.reads_per_expert
    if wish.layout != "auto":
        return [Spelling(conversion, wish.layout == "fused")]
    both = single and bool(target.fused()) and bool(wish.serves)
    return [Spelling(conversion, fused) for fused in ((False, True) if both else (not single,))]


def _next_step(reasons: Mapping[str, Sequence[str]], model_type: str) -> str:
    text = " ".join(" ".join(found) for found in reasons.values())
    if any(name in text for name in CLIENTS):
        return "leave out --for, and the report says what works where"
    if "would stay dense" in text or "only before" in text:
        return "use --layers all or last:N, or another --target"
    if "bias" in text:
        return "nothing in transformers keeps these biases in a mixture of experts; moetool does not drop them silently"
    return f"change the option that the sentence names; `moetool archs show {model_type}` lists what each target can hold"
