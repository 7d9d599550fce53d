"""The model card: README.md with the Hub's metadata, the command, and what was and was not kept."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from moetool.methods import works
from moetool.units import show_bytes, show_count

if TYPE_CHECKING:
    from moetool.data import JsonObject
    from moetool.methods.contract import Report
    from moetool.methods.prepared import Prepared
    from moetool.surgery.checkpoint import Checkpoint

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"(?:^|/)models--([^/]+--[^/]+)/snapshots/")


def render(prepared: Prepared, report: Report) -> bytes:
    """README.md as bytes."""
    lines = [
        *_front(prepared, report),
        f"# {os.path.basename(report.out)}",
        "",
        f"{_kind(report)} made by [moetool](https://pypi.org/project/moetool) {_verbs(prepared)}, from:",
        "",
        *(f"- `{_shown(name)}`" for name in prepared.names),
        "",
        "```",
        prepared.options.command or f"moetool {_verbs(prepared)}",
        "```",
        "",
        *_table(report),
        "",
        "`moetool verify DIR --against SRC` checks it; `moetool.json` says how to make it again.",
        "",
        *(f"- {line.label} {line.sentence}" for line in works.lines(report.clients)),
        *(f"- {sentence}" for sentence in _told(prepared, report)),
        *(f"- warning: {warning}" for warning in report.warnings),
    ]
    return ("\n".join(lines).rstrip() + "\n").encode("utf-8", "backslashreplace")


def _told(prepared: Prepared, report: Report) -> list[str]:
    """What every step says of itself."""
    said: list[str] = []
    for step, summary in zip(prepared.before, report.steps, strict=True):
        did = step.method.card(type(report).of(summary))
        said += [f"{step.options.method} first: {sentence}" for sentence in did]
    return [*said, *prepared.method.card(report)]


def _kind(report: Report) -> str:
    return "A mixture of experts" if report.facts.experts else "A model"


def _front(prepared: Prepared, report: Report) -> list[str]:
    """The Hub's metadata."""
    verbs = [p.options.method for p in (*prepared.before, prepared)]
    tags = list(dict.fromkeys([*(["moe"] if report.facts.experts else []), "moetool", *verbs]))
    lines = ["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in tags)]
    bases = [b for b in map(_base, prepared.names, prepared.origins) if b]
    if bases:
        lines += ["base_model:", *(f"- {b}" for b in dict.fromkeys(bases))]
    if len(prepared.origins) > 1:
        lines += ["base_model_relation: merge"]
    return [*lines, "---", ""]


def _verbs(prepared: Prepared) -> str:
    return ", then ".join(p.options.method for p in (*prepared.before, prepared))


def _shown(name: str) -> str:
    """A source without the folders above it."""
    return os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name


def _table(report: Report) -> list[str]:
    facts, certificate = report.facts, report.certificate
    counts = f"{show_count(facts.parameters)} total, {show_count(facts.active_parameters)} active"
    rows = {
        "certificate": certificate,
        "why": certificate.why,
        "from its source": _apart(report.quality or {}),
        "family": facts.target_type,
        "experts": facts.experts,
        "experts a token": facts.top_k,
        "expert width": facts.expert_width or None,
        "parameters": counts,
        "size": show_bytes(report.output_bytes),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return ["| | |", "|---|---|", *lines]


def _apart(quality: JsonObject) -> str | None:
    """How far a model is from its source at birth, where that was measured without text."""
    if "drawn" not in quality:
        return None
    return f"KL {quality['kl']:.2g} on {quality['tokens']:,} predictions of {quality['drawn']}"


def _base(name: str, source: Checkpoint) -> str | None:
    """A Hub id, where the source was one, lies in the Hub's cache or has a config that remembers
    one.
    """
    cached = _CACHED.search(os.path.realpath(source.folder))
    for candidate in (
        name.partition("@")[0] if not os.path.exists(name) else "",
        cached[1].replace("--", "/", 1) if cached else "",
        str(source.config.get("_name_or_path", "")),
    ):
        if _HUB.fullmatch(candidate) and not candidate.startswith((".", "/")):
            return candidate
    return None
