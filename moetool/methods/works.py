"""Where an output works, and where it does not: every verb's is judged alike, by what it will hold
(moetool/surgery/clients).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Line, Made, Method
from moetool.methods.options import Served
from moetool.surgery import clients, containers, forms, spellings
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.clients import Assigned, Judged, Traits
from moetool.surgery.clients.traits import RAGGED
from moetool.surgery.forms.form import float_of
from moetool.surgery.layout import Matched
from moetool.surgery.plan import Plan
from moetool.surgery.roles import Roles
from moetool.surgery.text_model import text_model

_LABELS = {
    "works": "works in",
    "wrong": "wrong in",
    "refuses": "refused by",
    "untried": "untried in",
}
_BROKEN = ("wrong", "refuses")


def traits(made: Made, folder: str) -> Traits:
    """What a plan's output is; `folder`: where the files lie that travel with it."""
    plan = made.plan
    return clients.traits(
        made.config,
        plan.targets,
        folder=folder,
        container=str(plan.container.get("name", "")),
        idle=_is_idle(plan),
    )


def of(made: Made, folder: str) -> tuple[Judged, ...]:
    """What every client makes of a plan's output; nothing where that is no model by itself."""
    if not containers.of(made.plan.container).is_model:
        return ()
    return clients.judged(traits(made, folder), made.scheme or _scheme(made.plan))


def _scheme(plan: Plan) -> list[Assigned]:
    """The matrices of an output and their forms, where some are not full."""
    seen = plan.seen()
    if not seen.told or plan.container:
        return []
    files = Checkpoint("", seen.config, seen.tensors, {}, told=seen.told)
    found = []
    for matrix in Roles.of(files).matrices:
        parts = seen.tensors[matrix.piece.name].parts
        form, params = (parts.form, parts.params) if parts else ("full", {})
        if forms.named(form).in_groups or forms.named(form).moves:  # judged with its model type
            continue
        found.append(
            Assigned(
                matrix.role,
                form,
                params,
                name=matrix.name,
                shape=matrix.shape,
                layer=matrix.layer,
                dtype=float_of(seen.config, matrix.dtype),
            )
        )
    return found


def _is_idle(plan: Plan) -> bool:
    """Whether every routed expert is made to put out zero."""
    try:
        at = text_model(plan.config)
    except MoetoolError:
        return False
    emptied = (task.outputs for task in plan.tasks if task.op == "zeros")
    zeros = {piece.name for piece in chain.from_iterable(emptied)}
    if not zeros:
        return False
    down = [name for name in plan.targets if _is_down(at.match(name))]
    return bool(down) and zeros.issuperset(down)


def _is_down(found: Matched | None) -> bool:
    return found is not None and found.slot.role == "expert.down"


# --- --for


def check_model(method: Method, source: Checkpoint) -> None:
    """Refuse before anything is decided, for a verb that keeps the model: what a client of --for
    makes of the source's.
    """
    if serves := _serves(method):
        config = spellings.completed(source.config)  # as it will be written
        found = clients.traits(config, source.tensors, folder=source.folder)
        _refuse(serves, found, [clients.model(name, found) for name in serves])


def check(method: Method, made: Made, source: Checkpoint) -> list[str]:
    """The same of a plan's output; what nobody has tried there, in sentences."""
    serves = _serves(method)
    if not serves:
        return []
    found = [one for one in of(made, source.folder) if one.client in serves]
    _refuse(serves, traits(made, source.folder), found)
    return [
        f"--for {one.client}: {'; '.join(one.why)} ({clients.evidence(one)})"
        for one in found
        if one.state == "untried"
    ]


def _serves(method: Method) -> tuple[str, ...]:
    return method.options.serves if isinstance(method.options, Served) else ()


def _refuse(serves: Sequence[str], output: Traits, found: Iterable[Judged]) -> None:
    broken = [one for one in found if one.state in _BROKEN and not one.through]
    if broken:
        raise UsageError(
            f"the output would not work in {' and '.join(one.client for one in broken)}",
            file=output.folder,
            expected=f"an output for {', '.join(serves)}",
            **{one.client: said(one) for one in broken},
            hint=_next(output, [one.client for one in broken]),
        )


def _next(output: Traits, broken: Sequence[str]) -> str:
    """Another cut, or single experts, where they would help."""
    usual = "leave out --for, and the report says what works where"
    if output.family == RAGGED:
        return "cut the model it was made from with --uneven ghost or zeroed, or --budget uniform"
    if output.facts.get("layout") != "fused":
        return usual
    single = replace(output, facts={**output.facts, "layout": "per-expert"})
    if any(clients.model(name, single).state in _BROKEN for name in broken):
        return usual
    return "single experts work there: `moetool convert-layout SRC OUT --to per-expert`"


def said(one: Judged) -> str:
    """`refuses it: its Qwen2-MoE ... (tried with mlx-lm 0.32.2)`."""
    does = {"wrong": "computes something else", "refuses": "refuses it"}
    what = does.get(one.state, "is untried")
    return f"{what}: {'; '.join(one.why)} ({clients.evidence(one)})"


# --- what is said


def lines(found: Sequence[Judged]) -> list[Line]:
    """A line for each thing that several clients do for the same reason, those that work first."""
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for one in sorted(found, key=lambda one: list(_LABELS).index(one.state)):
        mark = "*" if one.works and one.known == "source" else ""
        also = (f"{one.through}(OUT) reads it",) if one.through else ()
        alike.setdefault((one.state, one.why + also), []).append(one.client + mark)
    read = " (*: its source says so, it was not run)"
    made = []
    for (state, why), names in alike.items():
        sentence = ": ".join(filter(None, [", ".join(names), "; ".join(why)]))
        made.append(Line(_LABELS[state], sentence + (read if "*" in "".join(names) else "")))
    return made


def warnings(found: Sequence[Judged], output: Traits) -> list[str]:
    """One line where experts are stacked though the family reads single ones."""
    if output.facts.get("layout") != "fused":
        return []
    broken = [f"{o.client}: {'; '.join(o.why)}" for o in found if o.state == "wrong"]
    rest = [o.client for o in found if o.state in ("refuses", "untried")]
    broken += [f"refused by or untried in {', '.join(rest)}"] if rest else []
    return [f"experts are stacked, which few clients read ({'; '.join(broken)})"] if broken else []
