"""`moetool verify`: is an output what its plan said, and does it still compute what its source did?"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError, VerificationFailed
from moetool.evaluate import blocks, loaded, logits, ranges, readback, structure
from moetool.methods.certificates import weakest
from moetool.methods.contract import Certificate, Decisions, Made, Method, Settings
from moetool.methods.options import Checking
from moetool.methods.proof import Loaded, Proof
from moetool.progress import Progress, silent
from moetool.surgery import forms, groups, identity, source, spellings, tables, view
from moetool.surgery.checkpoint import Checkpoint, read_json
from moetool.surgery.device import check_device
from moetool.surgery.layout import words
from moetool.surgery.plan import Plan
from moetool.surgery.spec import Stored

EXACT = 1e-4
ROUNDED = 2e-2  # where the certificate says that weights were rounded to 16 bits


def verify(
    out: str,
    *,
    against: Sequence[str] = (),
    how: Checking | None = None,
    tell: Progress = silent,
) -> JsonObject:
    """Check a checkpoint that moetool wrote; returns what was measured. Raises VerificationFailed
    (exit code 4).

    Without `against`: structure only (plus, with `load`, stock transformers). With the sources:
    every byte, every FFN on random activations, and logits where both models fit into `memory` in
    float32.
    """
    how = how or Checking()
    check_device(how.device)
    checkpoint = structure.opened(source.locate(out))
    record = structure.recorded(checkpoint.folder)
    result: JsonObject = {
        "path": checkpoint.folder,
        "certificate": record["report"]["certificate"],
        "structure": structure.check_structure(checkpoint, record),
        **_stored(checkpoint, how, tell),
    }
    if not against:
        if how.load:
            logits.load(checkpoint, how.device)
            result["loads"] = True
        return result | {"verified": "structure"}
    sources = [Checkpoint.open(source.locate(name)) for name in _all_sources(record, against)]
    _same_sources(sources, record)
    with tempfile.TemporaryDirectory(prefix="moetool-") as folder:
        before = _before(sources, record, checkpoint.folder, Path(folder))
        read = _read(sources, before, record)
        again = _plan_again(read, record, checkpoint.folder)
        made = replace(again.made, certificate=_certificate(before, again.made))
        level = _certified(checkpoint, record, made)
        everything, seals = [*read, *_extra(record)], record.get("sealed", {})
        theirs = ranges.Against(everything, len(read), seals, how.device)
        result["bytes"] = ranges.compare_bytes(made.plan, checkpoint, theirs, tell)
        result["accounted"] = _account(read, made)
        result |= _read_back(everything, made, checkpoint, tell)
        if before:
            result["steps"] = [step.accounted for step in before]
    if not before and again.method.stands_for_ffns(again.made):
        result |= _function(sources[0], checkpoint, record, how)
    return result | {
        "verified": "bytes and function" if level in ("exact", "exact_if") else "bytes"
    }


def _stored(checkpoint: Checkpoint, how: Checking, tell: Progress) -> JsonObject:
    """How many matrices are stored in which form, where any is not full, and what the loader that
    was asked for makes of them.
    """
    packed = (t for t in checkpoint.tensors.values() if not forms.lies_plain(t))
    named = [t.parts.form for t in packed if t.parts]
    found: JsonObject = {name: named.count(name) for name in sorted(set(named))}
    said = {"forms": found} if named else {}
    if how.loader:
        said["loaded"] = _loaded(checkpoint, how, tell).as_json()
    return said


def _loaded(checkpoint: Checkpoint, how: Checking, tell: Progress) -> Loaded:
    """What the loader makes of its first layers."""
    if not checkpoint.told or checkpoint.hub_class:
        raise UsageError(
            "--loader compares what is stored in another form, and here all is full",
            file=checkpoint.folder,
            hint="--load compares logits",
        )
    config = read_json(Path(checkpoint.folder) / "config.json", what="model config")
    return loaded.check(checkpoint, config, how.loader, loaded.Within(memory=how.memory, tell=tell))


def _read_back(
    sources: Sequence[Checkpoint], made: Made, checkpoint: Checkpoint, tell: Progress
) -> JsonObject:
    """The errors of what was rounded; nothing where nothing was."""
    if not made.promised:
        return {}
    there = [p for p in made.promised if not _is_gone(sources[p.piece.source], p.piece.name)]
    output = readback.Output(made.plan, there, sources, checkpoint)
    held = readback.errors(output, readback.Readers(os.cpu_count() or 1, tell))
    return {"proof": Proof(held).as_json()}


def _is_gone(source: Checkpoint, name: str) -> bool:
    """Whether a matrix stems from what an earlier step solved."""
    return any(part.name in source.beyond for part in source.tensor(name).lying)


def _certified(checkpoint: Checkpoint, record: JsonObject, made: Made) -> str:
    """The level of the certificate, where plan and certificate are those of the record; raises
    VerificationFailed where they are not.
    """
    _same_plan(made, record, checkpoint.folder)
    level, why = (record["report"]["certificate"][name] for name in ("level", "why"))
    if level != made.certificate.level and why != made.certificate.unsound.why:
        raise VerificationFailed(
            "the certificate in moetool.json is not that of the plan",
            file=checkpoint.folder,
            expected=made.certificate.level,
            found=level,
            hint="restore moetool.json, or make the output again",
        )
    return str(level)


def _same_plan(made: Made, record: JsonObject, folder: str) -> None:
    digest = record["report"]["plan_digest"]
    if digest not in (made.plan.digest, _as_spelled(made.plan, folder)):
        raise VerificationFailed(
            "the same command now makes another plan",
            file=folder,
            expected=digest,
            found=made.plan.digest,
            hint="another version of moetool wrote it: verify with that version, or make it again",
        )


def _as_spelled(plan: Plan, folder: str) -> str:
    """The digest that a plan has with the config of the output, where that says the same and was
    only written before configs were spelled for every client; empty where it says something else.
    """
    path = Path(folder) / "config.json"
    said = read_json(path, what="model config") if path.exists() else {}
    return plan.sealed(said) if spellings.completed(said) == plan.config else ""


@dataclass(frozen=True)
class Before:
    """An earlier step, planned again: its certificate, what it would write, and how much of its
    source it accounts for. What it solved is gone: what became of that is known by its seal.
    """

    made: Made
    shown: Checkpoint
    accounted: JsonObject


def _before(
    sources: Sequence[Checkpoint], record: JsonObject, folder: str, work: Path
) -> list[Before]:
    """Every step before the last, from the sources on."""
    found: list[Before] = []
    for number, step in enumerate(record.get("before", ())):
        read = _read(sources, found, step)
        made = _plan_again(read, step, folder).made
        _same_plan(made, step, folder)
        everything = [*read, *_extra(step)]
        gone = view.beyond(made.plan.tasks, everything, len(read))
        parts = view.parted(made.plan, gone)
        how = view.Means(work / str(number), jobs=1, sync=False)
        rest = view.make(parts.rest, everything, how).files if parts.rest else None
        shown = view.of(made.plan, everything, parts.runs, rest, gone)
        found.append(Before(made, shown, {"method": step["method"], **_account(read, made)}))
    return found


def _read(
    sources: Sequence[Checkpoint], before: Sequence[Before], step: JsonObject
) -> list[Checkpoint]:
    """What a step read: the first one all sources, a later one what the one before it makes."""
    if not before:
        return list(sources)
    return [before[-1].shown, *(sources[1:] if step.get("further") else ())]


def _certificate(before: Sequence[Before], made: Made) -> Certificate:
    return weakest([*(step.made.certificate for step in before), made.certificate])


def _all_sources(record: JsonObject, against: Sequence[str]) -> list[str]:
    """The sources given, completed by the recorded ones where fewer were given."""
    recorded = [s["name"] for s in record["sources"]]
    if len(against) > len(recorded):
        raise UsageError(
            "more --against than there were sources",
            expected=f"at most {len(recorded)}: {', '.join(recorded)}",
            found=len(against),
            hint="give SRC first, then one --against for each --from",
        )
    return [*against, *recorded[len(against) :]]


def _same_sources(sources: Sequence[Checkpoint], record: JsonObject) -> None:
    for number, (checkpoint, known) in enumerate(zip(sources, record["sources"], strict=True)):
        found = ""
        if checkpoint.fingerprint() != known["files"]:
            found = "other headers or sizes"
        elif known.get("content", identity.content(checkpoint)) != identity.content(checkpoint):
            found = "the same headers, and other weights"
        if found:
            raise VerificationFailed(
                "this is not the source it was made from",
                file=checkpoint.folder,
                expected=f"the headers and weights of {known['name']}",
                found=found,
                hint="give the original " + ("SRC" if number == 0 else f"--from number {number}"),
            )


@dataclass(frozen=True)
class Again:
    """The recorded method, and the plan that it makes now."""

    method: Method
    made: Made


def _plan_again(sources: Sequence[Checkpoint], record: JsonObject, folder: str) -> Again:
    from moetool import methods

    method = methods.make(record["method"], record["options"])
    decisions = Decisions(
        tables=_tables(record, folder), chosen=record.get("decisions", {}), extra=_extra(record)
    )
    settings = Settings(seed=record["seed"], max_shard=record["max_shard"])
    return Again(method, method.plan(sources, decisions, settings))


def _tables(record: JsonObject, folder: str) -> dict[str, list[int]]:
    """The tables of a plan: in the record, and in files beside it."""
    found: dict[str, list[int]] = dict(record["tables"])
    for name, seal in record.get("table_files", {}).items():
        try:
            found |= tables.unpack(Path(folder) / Path(name).name, seal)
        except MoetoolError as problem:
            raise VerificationFailed(
                problem.message, **problem.where, hint="restore it, or make the output again"
            ) from None
    return found


def _extra(record: JsonObject) -> tuple[Checkpoint, ...]:
    """Sources that did not travel with the output, by their headers alone."""
    return tuple(map(_unseen, record.get("extra", ())))


def _unseen(said: JsonObject) -> Checkpoint:
    try:
        tensors = [Stored(n, d, tuple(s), f, a, b) for n, d, s, f, a, b in said["tensors"]]
        return Checkpoint(
            "",
            {},
            {t.name: t.checked() for t in tensors},
            {name: (size, seal) for name, size, seal in said["files"]},
        )
    except (KeyError, TypeError, ValueError, MoetoolError) as problem:
        raise VerificationFailed(
            "the record of moetool does not say which solved tensors there were",
            file="moetool.json",
            found=str(problem)[:80],
            hint="restore moetool.json, or make the output again",
        ) from None


def _account(sources: Sequence[Checkpoint], made: Made) -> dict[str, int]:
    """Every tensor of the first source is used or dropped by name."""
    plan = made.plan
    pieces = chain.from_iterable(task.inputs for task in plan.tasks)
    used = {p.name for p in pieces if p.source == 0}
    solved = (sources[0].tensor(p.piece.name) for p in made.promised if p.solved)
    used |= {part.name for part in chain.from_iterable(matrix.lying for matrix in solved)}
    lost = sorted(set(sources[0].stored) - used - set(plan.dropped))
    if lost and len(sources) == 1:
        raise VerificationFailed(
            "a source tensor is neither used nor dropped by name",
            file=sources[0].folder,
            tensor=lost[0],
            found=f"{len(lost)} such tensors",
            hint="report this as a bug of moetool",
        )
    return {
        "tensors_used": len(used),
        "tensors_dropped": len(plan.dropped),
        "fields_dropped": len(made.dropped_fields),
    }


def _function(base: Checkpoint, out: Checkpoint, record: JsonObject, how: Checking) -> JsonObject:
    """Each block against the FFN it was made of, then the logits of both models."""
    certificate = record["report"]["certificate"]
    limit = ROUNDED if "rounded" in certificate["why"] else EXACT
    measured = [asdict(e) for e in blocks.compare(base, out)]
    if certificate["level"] in ("exact", "exact_if"):
        _check_blocks(measured, out, limit)
    result: JsonObject = {"blocks": measured}
    skipped = _not_loaded(record, how) or _not_reached(out)
    if skipped:
        return result | {"logits": None, "logits_skipped": skipped}
    result["logits"] = logits.compare_logits(base, out, device=how.device)
    _check_logits(result["logits"], out, limit, certificate["level"])
    return result


def _not_reached(out: Checkpoint) -> str:
    """Why what a model gives says nothing of its experts: images and text come together in it, and
    text alone does not go where they are.
    """
    if not groups.is_ours(out.config) or not words().images_of(out.config):
        return ""
    found = {group.tower for group in groups.read(out.config)} - {groups.TEXT}
    return f"text alone does not go through the {found.pop()} tower" if found else ""


def _check_blocks(measured: list[JsonObject], out: Checkpoint, limit: float) -> None:
    wrong = [e for e in measured if not e["relative"] <= limit]  # NaN is wrong as well
    if wrong:
        worst = max(wrong, key=lambda e: (math.isnan(e["relative"]), e["relative"]))
        raise VerificationFailed(
            "a MoE block does not compute what its FFN did",
            file=out.folder,
            tensor=f"layer {worst['layer']}",
            expected=f"relative error at most {limit:g}",
            found=_shown(worst["relative"]),
            hint=_next(worst["relative"]),
        )


def _check_logits(found: JsonObject, out: Checkpoint, limit: float, level: str) -> None:
    """Exact means: the same logits, and with them the same words."""
    exact, relative = level in ("exact", "exact_if"), found["relative"]
    if (exact or math.isnan(relative)) and not relative <= limit:
        raise VerificationFailed(
            "logits are not those of the source",
            file=out.folder,
            expected=f"relative difference at most {limit:g}",
            found=_shown(relative),
            hint=_next(relative),
        )
    if level == "exact" and limit == EXACT and not (found["same_greedy"] or found["greedy_tie"]):
        raise VerificationFailed(
            "the model says other words than its source",
            file=out.folder,
            expected=f"the same {found['greedy_tokens']} greedy tokens",
            found="others",
            hint="report this as a bug of moetool",
        )


def _shown(relative: float) -> str:
    return "NaN: the model's answers are no numbers" if math.isnan(relative) else f"{relative:.3g}"


def _next(relative: float) -> str:
    if math.isnan(relative):
        return "a weight is NaN or inf: --strict names it in the source"
    return "report this as a bug of moetool"


def _not_loaded(record: JsonObject, how: Checking) -> str:
    """Why logits are not compared; empty where they are."""
    if not logits.available():
        return "transformers is not installed"
    if how.load is False:
        return "not asked for"
    fits = 4 * 2 * record["report"]["parameters"] < how.memory
    if not (fits or how.load):
        return f"the model does not fit into {how.memory:,} bytes in float32"
    return ""
