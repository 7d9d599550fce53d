"""The target of moetool's own: the base as it lies, byte for byte, and a group of experts in its
FFNs' blocks. Any dense family whose FFN the layout data finds can have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from moetool.errors import UsageError
from moetool.methods.contract import Builder, Decisions, Made, ModelFacts, Settings
from moetool.methods.upcycle import assemble
from moetool.methods.upcycle.ground import Ground, Place, Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.surgery import groups, reform, shim
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import Group
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.reform import Into
from moetool.surgery.spec import whole

_WHERE = {"under": " over the FFN", "beside": " beside the FFN"}


def decide(kind: ExpertKind, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
    """What a kind must read to plan."""
    _check_sources(kind, sources)
    return kind.decide(sources, settings)


def plan(
    kind: ExpertKind, sources: Sequence[Checkpoint], found: Decisions, settings: Settings
) -> Made:
    """The plan and its certificate; every refusal that needs only headers happens here."""
    _check_sources(kind, sources)
    told = kind.told_by(found)
    ground, *others = (Ground.of(source, kind.verb.layers, kind.verb.site) for source in sources)
    if not ground.layers:
        raise UsageError(
            f"{kind.spelled} without a layer",
            expected="a layer or more",
            found="--layers none",
            hint="leave out --layers",
        )
    kind.check(ground)
    kind.key.check(ground, kind.choices, kind.verb.top_k)
    group, build = kind.group(ground), Builder()
    names, into = ground.names(), dict[str, Into]()
    places: list[Place] = ["before", *range(ground.count), "after"]
    for place in places:
        gone = _gone(ground, group, place)
        for name in names.get(place, ()):
            if name not in gone:
                stored = ground.source.tensors[name]
                build.copy(whole(stored), whole(build.target(name, stored.dtype, stored.shape)))
        if not isinstance(place, int) or place not in ground.layers:
            continue
        for block in ground.blocks:
            spot = Spot(ground, group, place, block, settings.seed, tuple(others))
            _router(build, kind, spot)
            into |= kind.write(build, spot)
    config = groups.config_of(sources[0].config, (group,)) | {"auto_map": dict(shim.AUTO_MAP)}
    wanted = Outputs(config, build.targets, build.tasks, ground.dropped())
    made = reform.plan((*sources, *found.extra), wanted, max_shard=settings.max_shard, into=into)
    facts = _facts(ground, group, made)
    certificate, files = kind.certificate(group, len(sources)), {shim.FILE: shim.TEXT.encode()}
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
    assemble.check_alike(sources)


def _gone(ground: Ground, group: Group, place: Place) -> set[str]:
    """The FFN's own tensors in a layer whose experts stand in its stead."""
    if group.base != "gone" or not isinstance(place, int) or place not in ground.layers:
        return set()
    linears = [*chain.from_iterable(block.linears for block in ground.blocks)]
    biases = (ground.bias(one, place) for one in linears)
    own = (ground.stored(one, place) for one in linears)
    return {one.name for one in (*own, *biases) if one is not None}


def _router(build: Builder, kind: ExpertKind, spot: Spot) -> None:
    """The router of a layer, as --router says it starts."""
    given = kind.router(build, spot)
    if given is None:
        kind.key.write(build, spot, kind.first_router)
        return
    name = f"{spot.module}.{spot.group.router}.weight"
    held = kind.found.extra[given.source - 1 - len(spot.others)].tensor(given.name)
    build.copy(given, whole(build.target(name, held.dtype, given.shape)))


def _facts(ground: Ground, group: Group, plan: Plan) -> ModelFacts:
    return ModelFacts(
        source_type=str(ground.source.config.get("model_type")),
        target_type=groups.MODEL_TYPE,
        layers=group.layers,
        experts=group.experts,
        top_k=group.reached,
        expert_width=ground.width
        if any(group.has(one.name) for one in ground.block.linears)
        else 0,
        layout=f"{group.form} experts{_WHERE.get(group.base, '')}",
        parameters=plan.parameters,
        active_parameters=plan.active_parameters,
        expert_sources=(0,) * group.experts,  # what it stands on: `verify` compares their logits
    )
