"""The target of moetool's own: the base as it lies, byte for byte, and a group of experts in its
FFNs' blocks. Any dense family whose FFN the layout data finds can have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, product, starmap
from typing import NamedTuple

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Builder, Decisions, Made, ModelFacts, Settings
from moetool.methods.upcycle import assemble
from moetool.methods.upcycle.ground import Ground, Place, Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.methods.upcycle.laws.law import INSIDE
from moetool.surgery import forms, groups, places, reform, shim
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import Group
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.reform import Into
from moetool.surgery.reserved import RESERVED
from moetool.surgery.spec import FLOATS, Stored, whole
from moetool.surgery.text_model import text_model

TRUNKS = "trunks"  # in a report: how far each source's other tensors are from the first one's
_WHERE = {"under": " over the FFN", "beside": " beside the FFN", INSIDE: " of the FFN"}


def decide(kind: ExpertKind, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
    """What a kind must read to plan."""
    _check_sources(kind, sources)
    found = kind.decide(sources, settings)
    extra = (*found.extra, *kind.key.files(settings.work))
    if len(sources) == 1:
        return replace(found, extra=extra)
    trunks = assemble.trunk_report(tuple(map(_dense, sources)), _kept_of_first(kind, sources[0]))
    return replace(found, extra=extra, report=found.report | {TRUNKS: trunks})


def _kept_of_first(kind: ExpertKind, source: Checkpoint) -> list[str]:
    """Tensors that only the first source gives: all but the matrices that experts are made of, and
    their biases.
    """
    ground = kind.ground(source)
    own = set()
    for layer, linear in product(ground.layers, ground.linears):
        own.add(ground.stored(linear, layer).name)
        bias = ground.bias(linear, layer)
        own |= {bias.name} if bias is not None else set()
    return [name for name in _dense(source).tensors if name not in own]


def _trunks_told(found: Decisions) -> Iterator[str]:
    """Say what of a fine-tune no expert holds."""
    for row in found.report.get(TRUNKS, ()):
        if row["distance"]:
            yield (
                f"what {row['source']} changed beside the matrices of its experts is left out: the "
                f"model has SRC's (relative distance {row['distance']:.2g}, most in "
                f"{row['furthest']})"
            )


def plan(
    kind: ExpertKind, sources: Sequence[Checkpoint], found: Decisions, settings: Settings
) -> Made:
    """The plan and its certificate; every refusal that needs only headers happens here."""
    _check_sources(kind, sources)
    told = (*kind.told_by(found), *(_trunks_told(found) if kind.verb.trunk == "base" else ()))
    kind.key.attach(found.extra, len(sources))
    ground, *others = (kind.ground(source) for source in sources)
    _check_layers(kind, ground)
    kind.check(ground)
    kind.key.check_tower(ground.tower)
    kind.key.check(ground, kind.choices, kind.verb.top_k)
    group, build = _beside(ground, kind.group(ground)), Builder()
    told += tuple(kind.combine.warned(group))
    names, into = ground.names(), dict[str, Into]()
    places: list[Place] = ["before", *range(ground.count), "after"]
    own = _own(ground, group)
    gone = own if group.base == "gone" else set()
    mixed = {n: m for n, m in _mixed(kind, sources).items() if n not in own}
    _check_names(ground, mixed)
    for place in places:
        for name in names.get(place, ()):
            if name in gone or kind.copied(build, ground, name):
                continue
            if name in mixed:
                mixed[name].write(build)
            else:
                into |= kept(build, ground.source.tensors[name], ground.today(name))
        if not isinstance(place, int) or place not in ground.layers:
            continue
        for block in ground.blocks:
            spot = Spot(ground, group, place, block, settings.seed, tuple(others))
            _router(build, kind, spot)
            into |= kind.write(build, spot)
    config = _config(ground, group)
    wanted = Outputs(config, build.targets, build.tasks, ground.dropped())
    made = reform.plan(
        (*sources, *found.extra),
        wanted,
        max_shard=settings.max_shard,
        tables=found.tables,
        into=into,
    )
    facts = replace(_facts(kind, ground, group, made), trunks=tuple(found.report.get(TRUNKS, ())))
    certificate, files = kind.certificate(group, len(sources)), {shim.FILE: shim.TEXT.encode()}
    if mixed:
        certificate = assemble.mixed()
    far = certificate.level == "none"
    return Made(made, certificate, made.config, {}, facts, told, files, compared=far)


def _check_sources(kind: ExpertKind, sources: Sequence[Checkpoint]) -> None:
    if len(sources) > 1 and not kind.several:
        raise UsageError(
            f"--from does nothing with {kind.spelled}",
            expected=f"{kind.spelled} alone",
            found=f"{len(sources) - 1} --from",
            hint="leave out --from",
        )
    assemble.check_trunk(kind.verb.trunk, len(sources))
    first, *rest = map(_dense, sources)
    if groups.is_ours(sources[0].config):  # what its groups stand for may be gone
        rest = [replace(o, tensors=_common(o, first)) for o in rest]
    assemble.check_alike((first, *rest))


def _check_layers(kind: ExpertKind, ground: Ground) -> None:
    """Refuse experts nowhere, and such as stand for what keeps a token's width, where it does not."""
    if not ground.layers:
        raise UsageError(
            f"{kind.spelled} without a layer",
            expected="a layer or more",
            found="--layers none",
            hint="leave out --layers",
        )
    if ground.hidden != ground.given and kind.keeps_width and kind.verb.site == groups.FIRST_SITE:
        raise UsageError(
            f"{kind.spelled} gives what is as wide as what it sees",
            expected="an FFN that does",
            found=f"{ground.hidden} -> {ground.given} at {ground.module(ground.layers[0])}",
            hint="take other experts, for example --form lora or full",
        )


def _dense(source: Checkpoint) -> Checkpoint:
    """A model without its groups."""
    if not groups.is_ours(source.config):
        return source
    config = groups.base_of(source.config)
    at = text_model(config)
    own = {n: t for n, t in source.tensors.items() if at.inner(n) is None or at.match(n)}
    return replace(source, config=config, tensors=own)


def _common(source: Checkpoint, other: Checkpoint) -> dict[str, Stored]:
    return {n: t for n, t in source.tensors.items() if n in other.tensors}


def _beside(ground: Ground, group: Group) -> Group:
    """The group, under a name that is free beside those that SRC has already. UsageError where it
    cannot stand beside them.
    """
    beside = (g for g in ground.at.groups if g.tower == group.tower)
    here = [g for g in beside if set(g.layers) & set(group.layers)]
    taken = _taken(ground, group, here)
    if group.name in taken and group.name == groups.FIRST:
        numbered = (f"{groups.FIRST}_{n}" for n in count(2))
        group = replace(group, name=next(n for n in numbered if n not in taken))
    modules = _modules(ground, group)
    for other in here:
        both = modules & _modules(ground, other)
        fits = other.site == group.site and not places.named(group.site).alone
        if both and not (fits and groups.add_up([group, other])):
            raise UsageError(
                f"the group {other.name!r} of SRC stands there already",
                expected="a site, layers or a name without one, or experts beside the FFN",
                found=f"{group.form} experts at the site {group.site}, layers {_shown(group)}, "
                f"called {group.name!r}",
                hint="see `moetool inspect SRC`",
            )
    if both := (taken | RESERVED) & {group.name, group.router}:
        raise UsageError(
            f"something is called {both.pop()!r} there already",
            expected="a name of its own",
            found=f"--name {group.name}",
            hint=f"another name, none of {', '.join(sorted(taken))}",
        )
    return group


def _taken(ground: Ground, group: Group, here: Sequence[Group]) -> set[str]:
    """Names inside the modules that get a group: their own, and those of groups there."""
    near = [g for g in here if g.site == group.site]
    taken = {g.name for g in near} | {g.router for g in near}
    for module in (ground.module(group.layers[0], block) for block in ground.blocks):
        inside = (n for n in ground.source.tensors if n.startswith(f"{module}."))
        taken |= {n.removeprefix(f"{module}.").partition(".")[0] for n in inside}
    return taken


def _modules(ground: Ground, group: Group) -> set[str]:
    blocks = places.named(group.site).of(ground.at.layout, group)
    return {block.module for block in blocks}


def _shown(group: Group) -> str:
    return ", ".join(map(str, group.layers))


def _check_names(ground: Ground, mixed: Mapping[str, Mixed]) -> None:
    """Refuse to mix tensors that lie under older names: they would get today's."""
    if mixed and ground.older[0]:
        raise UsageError(
            f"--trunk {ground.tower} of tensors under older names",
            expected=f"{ground.older[1]}... as transformers saves them today",
            found=f"{ground.older[0]}...",
            hint="save the sources again with transformers, or leave out --trunk",
        )


def _mixed(kind: ExpertKind, sources: Sequence[Checkpoint]) -> Mapping[str, Mixed]:
    """The tensors that --trunk mixes: all numbers that every source has. Groups that SRC has are
    its own.
    """
    weights = assemble.trunk_weights(kind.verb.trunk, len(sources))
    if weights is None:
        return {}
    first, *others = sources
    shared = (n for n in first.tensors if all(n in other.tensors for other in others))
    held = {n: [source.tensors[n] for source in sources] for n in shared}
    for name, stored in held.items():
        if any(one.parts is not None for one in stored):
            raise MoetoolError(
                "a trunk in another form than full cannot be mixed",
                file=first.folder,
                tensor=name,
                expected=f"numbers: {', '.join(FLOATS)}",
                found=next(one.parts.form for one in stored if one.parts),
                hint="`moetool dequantize` writes the models in full",
            )
    return {n: Mixed(s, weights) for n, s in held.items() if s[0].dtype in FLOATS}


class Mixed(NamedTuple):
    """One tensor of several models, and how much of each is to be in it."""

    stored: Sequence[Stored]
    weights: list[float]

    def write(self, build: Builder) -> None:
        """Plan it."""
        first = self.stored[0]
        out = whole(build.target(first.name, first.dtype, first.shape))
        pieces = [whole(one, number) for number, one in enumerate(self.stored)]
        build.task("combine", pieces, [out], weights=self.weights)


def kept(build: Builder, stored: Stored, name: str = "") -> dict[str, Into]:
    """A tensor of SRC as it lies; what holds an expert of its groups stays in its form."""
    build.copy(whole(stored), whole(build.target(name or stored.name, stored.dtype, stored.shape)))
    held = stored.parts
    if held is None or not forms.named(held.form).in_groups:
        return {}
    return {stored.name: Into(held.form, held.params, kept=True)}


def _config(ground: Ground, group: Group) -> JsonObject:
    """Of SRC, with one group more."""
    said = ground.source.config
    held: tuple[Group, ...] = ()
    if groups.is_ours(said):
        held, said = groups.read(said), groups.base_of(said)
    return groups.config_of(said, (*held, group)) | {"auto_map": dict(shim.AUTO_MAP)}


def _own(ground: Ground, group: Group) -> set[str]:
    """The FFNs' own tensors in the layers where experts stand."""
    linears = chain.from_iterable(block.linears for block in ground.blocks)
    gone = [*product((one for one in linears if group.has(one.name)), group.layers)]
    own = [*starmap(ground.stored, gone), *starmap(ground.bias, gone)]
    return {one.name for one in own if one is not None}


def _router(build: Builder, kind: ExpertKind, spot: Spot) -> None:
    """The router of a layer, as --router says it starts."""
    if (spot.group.once and not spot.first) or kind.routed(build, spot):
        return
    given = kind.router(build, spot)
    if given is None:
        kind.key.write(build, spot, kind.first_router)
        return
    name = f"{spot.module}.{spot.group.router}.weight"
    held = kind.found.extra[given.source - 1 - len(spot.others)].tensor(given.name)
    build.copy(given, whole(build.target(name, held.dtype, given.shape)))
    for tensor in spot.group.router_tensors[1:]:
        kind.key.one(build, spot, tensor, kind.first_router)


def _facts(kind: ExpertKind, ground: Ground, group: Group, plan: Plan) -> ModelFacts:
    return ModelFacts(
        source_type=str(ground.source.config.get("model_type")),
        target_type=groups.MODEL_TYPE,
        layers=group.layers,
        experts=group.experts,
        top_k=group.reached,
        expert_width=kind.width(ground, group),
        layout=f"{group.form} experts{_WHERE.get(kind.stands, '')}",
        parameters=plan.parameters,
        active_parameters=plan.active_parameters,
        expert_sources=(0,) * group.experts,  # what it stands on: `verify` compares their logits
    )
