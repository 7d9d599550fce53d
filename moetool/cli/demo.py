"""`moetool demo`: the whole pipeline on the checkpoint that ships with moetool."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from moetool.cli.app import session
from moetool.cli.options import Command, Given
from moetool.data import JsonObject
from moetool.methods.field import RUN, Field
from moetool.units import show_bytes, show_count, show_seconds

# What to show: a name, and the options of upcycle.
SHOWN: tuple[tuple[str, JsonObject], ...] = (
    ("8 copies, top-2", {"experts": 8, "top_k": 2}),
    ("16 parts (4 groups of 4), top-4", {"experts": 16, "split": 4, "top_k": 4}),
    ("shared FFN + 8 routed from zero", {"experts": 8, "top_k": 2, "shared": True, "split": 4}),
    ("every 2nd layer, 4 copies, top-2", {"experts": 4, "top_k": 2, "layers": "every:2"}),
    ("copies, half of the neurons re-drawn", {"experts": 8, "top_k": 2, "diversify": "drop:0.5"}),
)
KEEP = Field("keep", str, "", "keep the outputs in this folder", RUN, metavar="DIR")
HEAD = [
    "upcycling",
    "family",
    "parameters",
    "active",
    "size",
    "written in",
    "certificate",
    "block error",
    "logit error",
]


def run(given: Given) -> int:
    """Upcycle, verify, print a table."""
    from moetool.demo import MODEL

    begun, sink = time.perf_counter(), session.sink
    with tempfile.TemporaryDirectory(prefix="moetool-demo-") as scratch:
        folder = Path(str(given.values.get("keep") or scratch))
        rows = [
            _one(name, options, MODEL, folder / f"demo-{number}")
            for number, (name, options) in enumerate(SHOWN, 1)
        ]
    seconds = time.perf_counter() - begun
    sink.result({"rows": rows, "seconds": round(seconds, 2)})
    title = f"a trained Llama of {show_count(rows[0]['dense'])} parameters ({MODEL})"
    sink.table(HEAD, [_cells(row) for row in rows], title=title)
    checked = f"all {len(rows)} outputs verified byte for byte in {show_seconds(seconds)}"
    sink.line(f"\nerrors are relative to the dense model, in float32; {checked}")
    sink.line("next: moetool upcycle demo my-moe && moetool verify my-moe --against demo")
    return 0


COMMAND = Command(
    "demo",
    "Upcycle the embedded tiny model in five ways, verify each, and print a table.",
    run,
    fields=(KEEP,),
    examples=("moetool demo", "moetool demo --keep outputs", "moetool demo --json"),
    panel="Look",
)


def _cells(row: JsonObject) -> list[object]:
    return [
        row["name"],
        row["family"],
        show_count(row["parameters"]),
        show_count(row["active"]),
        show_bytes(row["bytes"]),
        show_seconds(row["seconds"]),
        row["certificate"],
        _figure(row["block_error"]),
        _figure(row["logit_error"]),
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1g}"


def _one(name: str, options: JsonObject, source: Path, out: Path) -> JsonObject:
    from moetool import pipeline
    from moetool.evaluate.verify import verify
    from moetool.methods.contract import ModelFacts
    from moetool.methods.prepared import Options

    session.sink.say(f"{name} ...")
    session.working = True
    prepared = pipeline.prepare(Options(str(out), (str(source),), "upcycle", options))
    report = pipeline.write(prepared, pipeline.Caller(stop=session.stop))
    session.working = False
    checked = verify(str(out), against=[str(source)])
    facts = ModelFacts.of(report.facts)
    return {
        "name": name,
        "family": facts.target_type,
        "parameters": facts.parameters,
        "active": facts.active_parameters,
        "bytes": report.output_bytes,
        "seconds": report.seconds,
        "certificate": report.certificate.level,
        "block_error": max(b["relative"] for b in checked["blocks"]),
        "logit_error": (checked["logits"] or {}).get("relative"),
        "dense": _count(source),
    }


def _count(source: Path) -> int:
    from moetool.surgery.checkpoint import Checkpoint

    return sum((t.stop - t.start) // 2 for t in Checkpoint.open(source).tensors.values())
