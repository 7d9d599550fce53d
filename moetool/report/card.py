"""The model card: README.md with the Hub's metadata, the command, and what was and was not kept."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from moetool.units import show_bytes, show_count

if TYPE_CHECKING:
    from moetool.pipeline import Prepared

_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def render(prepared: Prepared, report: dict[str, Any]) -> bytes:
    """README.md as bytes."""
    certificate = prepared.made.certificate
    bases = [b for b in map(_base, prepared.names, (s.config for s in prepared.sources)) if b]
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- moe",
        "- moetool",
        f"- {prepared.options.method}",
    ]
    if bases:
        lines += ["base_model:", *(f"- {b}" for b in dict.fromkeys(bases))]
    if len(prepared.sources) > 1:
        lines += ["base_model_relation: merge"]
    lines += ["---", "", f"# {os.path.basename(os.path.abspath(prepared.options.out))}", ""]
    lines += [
        f"A mixture of experts made by [moetool](https://pypi.org/project/moetool) {prepared.options.method}, from:",
        "",
    ]
    lines += [
        f"- `{os.path.basename(os.path.normpath(n)) if os.path.exists(n) else n}`"
        for n in prepared.names
    ]
    lines += [
        "",
        "```",
        prepared.options.command or f"moetool {prepared.options.method}",
        "```",
        "",
    ]
    lines += [
        "| | |",
        "|---|---|",
        f"| certificate | {certificate} |",
        f"| why | {certificate.why} |",
    ]
    for key, name in (
        ("target_type", "family"),
        ("experts", "experts"),
        ("top_k", "experts a token"),
        ("expert_width", "expert width"),
    ):
        if key in report:
            lines.append(f"| {name} | {report[key]} |")
    lines.append(
        f"| parameters | {show_count(report.get('parameters', 0))} total, {show_count(report.get('active_parameters', 0))} active |"
    )
    lines.append(f"| size | {show_bytes(report['output_bytes'])} |")
    lines += [
        "",
        "`moetool verify DIR --against SRC` checks it; `moetool.json` says how to make it again.",
        "",
    ]
    if "reduction" in report:
        lines += [
            f"- {report['experts_before']} -> {report['experts_after']} experts a layer ({100 * report['removed_share']:.0f} % removed) by {report['method_used']}; report.json says which, decisions.json replays it"
        ]
        return _joined(lines, report)
    lines += [
        f"- left out: `{n}` ({why})"
        for n, why in {
            **report["dropped_tensors"],
            **{f"config.{k}": v for k, v in report["dropped_fields"].items()},
        }.items()
    ]
    return _joined(lines, report)


def _joined(lines: list[str], report: dict[str, Any]) -> bytes:
    return (
        "\n".join([*lines, *(f"- warning: {w}" for w in report["warnings"])]).rstrip() + "\n"
    ).encode()


def _base(name: str, config: dict[str, Any]) -> str | None:
    """A Hub id, where the source was one or its config remembers one."""
    for candidate in (
        name.partition("@")[0] if not os.path.exists(name) else "",
        str(config.get("_name_or_path", "")),
    ):
        if _HUB.fullmatch(candidate) and not candidate.startswith((".", "/")):
            return candidate
    return None
