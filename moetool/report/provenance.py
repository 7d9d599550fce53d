"""moetool.json: enough to make the output again, and to check that it is what was asked for."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetool.road import Prepared

SCHEMA = 1
# Facts of one run, not of the result: they would make two equal outputs differ.
_OF_THE_RUN = ("seconds", "peak_memory", "jobs", "free_disk", "resumed_shards", "ray_nodes", "out", "read_bytes")


def record(prepared: Prepared, report: dict[str, Any]) -> bytes:
    """The file's bytes; the same command on the same sources gives the same bytes."""
    config = json.dumps(prepared.made.config, indent=2, ensure_ascii=False) + "\n"
    data = {
        "schema": SCHEMA, "moetool": _version("moetool"), "python": platform.python_version(), "command": prepared.options.command,
        "method": prepared.options.method, "options": report["options"], "seed": prepared.options.seed, "max_shard": prepared.options.max_shard,
        "sources": [{"name": n, "files": s.fingerprint()} for n, s in zip(prepared.names, prepared.sources, strict=True)],
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "report": {k: v for k, v in report.items() if k not in (*_OF_THE_RUN, "options", "seed", "method")},
    }  # fmt: skip
    head = json.dumps(data, indent=1, ensure_ascii=False).removesuffix("\n}")
    tables = json.dumps(prepared.plan.tables, separators=(",", ":"))  # long lists of neuron numbers: one line
    return f'{head},\n "tables": {tables}\n}}\n'.encode()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
