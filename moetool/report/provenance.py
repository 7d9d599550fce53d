"""moetool.json: enough to make the output again, and to check that it is what was asked for."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from moetool import strict_json
from moetool.data import JsonObject
from moetool.surgery import identity, view
from moetool.surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    from moetool.methods.contract import Report, Summary
    from moetool.methods.prepared import Prepared

SCHEMA = 1
# Facts of one run, not of the result: they would make two equal outputs differ.
_OF_THE_RUN = (
    "seconds",
    "peak_memory",
    "jobs",
    "free_disk",
    "resumed_shards",
    "ray_nodes",
    "out",
    "read_bytes",
    "stages",
    "peak_rss",
    "quality",
    "proof",
)
_ELSEWHERE = ("options", "seed", "method", "decisions", "steps")  # at the top of the file


def record(prepared: Prepared, report: Report, written: Checkpoint | None = None) -> bytes:
    """The file's bytes; the same command on the same sources gives the same bytes. `written`: the
    finished shards, where the plan read more than the named sources (statistics, solved tensors):
    what came of those is sealed, since they do not travel with the output.
    """
    config = json.dumps(prepared.made.config, indent=2, ensure_ascii=False) + "\n"
    said = report.as_json()
    data = {
        "schema": SCHEMA,
        "moetool": version_of("moetool"),
        "python": platform.python_version(),
        "command": prepared.options.command,
        "method": prepared.options.method,
        "options": said["options"],
        "seed": prepared.options.common.seed,
        "max_shard": prepared.options.common.max_shard_size,
        **_further(prepared),
        "sources": [
            {"name": n, "files": s.fingerprint(), "content": identity.content(s)}
            for n, s in zip(prepared.names, prepared.origins, strict=False)
        ],
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "report": {k: v for k, v in said.items() if k not in (*_OF_THE_RUN, *_ELSEWHERE)},
    }
    if written is not None:
        data["extra"] = [_headers(s) for s in prepared.sources[prepared.named :]]
        data["sealed"] = sealed(prepared, written)
    head = strict_json.text(data, indent=1).removesuffix("\n}")
    if prepared.chosen:  # long: a layer on a line
        head += f',\n "decisions": {_lined(prepared.chosen)}'
    if prepared.before:
        pairs = zip(prepared.before, report.steps, strict=True)
        lines = ",\n  ".join(json.dumps(_step(*pair)) for pair in pairs)
        head += f',\n "before": [\n  {lines}\n ]'
    beside = prepared.made.beside
    if beside:
        seals = {name: _sha256(prepared.made.files[name]) for name in sorted({*beside.values()})}
        head += f',\n "table_files": {json.dumps(seals)}'
    tables = {name: table for name, table in prepared.plan.tables.items() if name not in beside}
    line = json.dumps(tables, separators=(",", ":"))  # long lists of neuron numbers: one line
    return f'{head},\n "tables": {line}\n}}\n'.encode("utf-8", "backslashreplace")


def _lined(chosen: JsonObject) -> str:
    """What was decided, a layer on a line."""
    return strict_json.lined(chosen, "layers") if "layers" in chosen else json.dumps(chosen)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _headers(source: Checkpoint) -> JsonObject:
    """A source that does not travel with the output, by its headers alone."""
    tensors = [
        [t.name, t.dtype, list(t.shape), t.file, t.start, t.stop] for t in source.stored.values()
    ]
    return {
        "files": source.fingerprint(),
        "content": identity.content(source),
        "tensors": tensors,
    }


def _step(prepared: Prepared, summary: Summary) -> JsonObject:
    """An earlier step: enough to plan it again. Its solved tensors are known by their headers."""
    said = summary.as_json()
    return {
        "method": prepared.options.method,
        "options": said["options"],
        "seed": prepared.options.common.seed,
        "max_shard": prepared.options.common.max_shard_size,
        **_further(prepared),
        "report": {k: v for k, v in said.items() if k not in (*_OF_THE_RUN, *_ELSEWHERE)},
        "extra": [_headers(s) for s in prepared.sources[prepared.named :]],
        "decisions": prepared.chosen,
        "tables": prepared.plan.tables,
    }


def _further(prepared: Prepared) -> JsonObject:
    """Whether a later step read the further sources too."""
    return {"further": True} if prepared.before and prepared.options.further else {}


def sealed(prepared: Prepared, written: Checkpoint) -> dict[str, str]:
    """{output piece: sha256} of everything that stems from what does not travel with it."""
    seals = {}
    for task in prepared.plan.tasks:
        if any(view.is_beyond(p, prepared.sources, prepared.named) for p in task.inputs):
            for piece in task.outputs:
                seals[f"{piece.name}@{piece.offset}"] = hashlib.sha256(
                    written.read(piece)
                ).hexdigest()
    return seals


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
