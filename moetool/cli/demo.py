"""`moetool demo`: the whole pipeline on the checkpoint that ships with moetool."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moetool.cli.main import app, session
from moetool.units import show_bytes, show_count, show_seconds

# What to show: a name, and the options of upcycle.
SHOWN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("8 copies, top-2", {"experts": 8, "top_k": 2}),
    ("16 parts (4 groups of 4), top-4", {"experts": 16, "split": 4, "top_k": 4}),
    ("shared FFN + 8 routed from zero", {"experts": 8, "top_k": 2, "shared": True, "split": 4}),
    ("every 2nd layer, 4 copies, top-2", {"experts": 4, "top_k": 2, "layers": "every:2"}),
    ("copies, half of the neurons re-drawn", {"experts": 8, "top_k": 2, "diversify": "drop:0.5"}),
)


@app.command()
def demo(keep: Annotated[str, typer.Option(help="keep the outputs in this folder")] = "") -> int:
    """Upcycle the embedded tiny model in five ways, verify each, and print a table."""
    from moetool.demo import MODEL

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moetool-demo-") as scratch:
        folder = Path(keep or scratch)
        rows = [
            _one(name, options, MODEL, folder / f"demo-{number}")
            for number, (name, options) in enumerate(SHOWN, 1)
        ]
    seconds = time.perf_counter() - begun
    session.sink.result({"rows": rows, "seconds": round(seconds, 2)})
    session.sink.table(
        [
            "upcycling",
            "family",
            "parameters",
            "active",
            "size",
            "written in",
            "certificate",
            "block error",
            "logit error",
        ],
        [
            [
                r["name"],
                r["family"],
                show_count(r["parameters"]),
                show_count(r["active"]),
                show_bytes(r["bytes"]),
                show_seconds(r["seconds"]),
                r["certificate"],
                _figure(r["block_error"]),
                _figure(r["logit_error"]),
            ]
            for r in rows
        ],
        title=f"a trained Llama of {show_count(rows[0]['dense'])} parameters ({MODEL})",
    )
    if session.sink.mode == "human":
        print(
            f"\nerrors are relative to the dense model, in float32; all {len(rows)} outputs verified byte for byte in {show_seconds(seconds)}"
        )
        print("next: moetool upcycle demo my-moe && moetool verify my-moe --against demo")
    return 0


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1g}"


def _one(name: str, options: dict[str, Any], source: Path, out: Path) -> dict[str, Any]:
    from moetool import pipeline
    from moetool.evaluate.verify import verify

    session.sink.say(f"{name} ...")
    session.working = True
    report = pipeline.make(
        pipeline.prepare(
            pipeline.Options(
                out=str(out), sources=(str(source),), method="upcycle", method_options=options
            )
        ),
        stop=session.stop,
    )
    session.working = False
    checked = verify(str(out), against=[str(source)])
    return {
        "name": name,
        "family": report["target_type"],
        "parameters": report["parameters"],
        "active": report["active_parameters"],
        "bytes": report["output_bytes"],
        "seconds": report["seconds"],
        "certificate": report["certificate"]["level"],
        "block_error": max(b["relative"] for b in checked["blocks"]),
        "logit_error": (checked["logits"] or {}).get("relative"),
        "dense": _count(source),
    }


def _count(source: Path) -> int:
    from moetool.surgery.checkpoint import Checkpoint

    return sum((t.stop - t.start) // 2 for t in Checkpoint.open(source).tensors.values())
