"""What protecting super experts costs and saves: `python tests/bench/compress.py TESTBED --only
protect`.

First, how far the largest output lies above the others on different texts (the testbed has no super
expert), and what keeping it costs all the same. Then a super expert is planted (two rows of one
down matrix times 3,000), and half of the experts go with and without --protect.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.bench.quantize import LENGTH, SEQUENCES, Meter, documents, texts

MODEL = "qwen3moe-16x4"
PLANTED, ROWS, TIMES = "model.layers.1.mlp.experts.2.down_proj.weight", [5, 17], 3000.0
TOLD = {"tokens": SEQUENCES * LENGTH, "seq_len": LENGTH, "refit": False}


def planted(source: Path, out: Path) -> Path:
    """The model with two rows of one expert's down matrix made enormous."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    tensors[PLANTED][ROWS] *= TIMES
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def by_domain(bed: Path, folder: Path) -> dict[str, str]:
    """A file of each domain of the calibration text."""
    files: dict[str, list[str]] = {}
    for row in documents(bed):
        files.setdefault(row["domain"], []).append(json.dumps({"text": row["text"]}))
    for domain, rows in files.items():
        (folder / f"only.{domain}.jsonl").write_text("\n".join(rows) + "\n")
    return {domain: str(folder / f"only.{domain}.jsonl") for domain in files}


def pruned(model: Path, out: Path, **told: Any) -> dict[str, Any]:
    """The report of one run with half of the experts gone."""
    import moetool

    shutil.rmtree(out, ignore_errors=True)
    report: dict[str, Any] = moetool.prune(str(model), str(out), ratio=0.5, **{**TOLD, **told})
    return report


def measure(bed: Path, folder: Path) -> None:
    """Print three tables."""
    from transformers import AutoTokenizer

    model, out = bed / MODEL, folder / "out"
    tokens, _ = texts(bed, folder, AutoTokenizer.from_pretrained(model))
    val = sorted((bed / "text").glob("val.*.jsonl"))
    print("| text | largest output | times the next | super |\n|---|---|---|---|")
    for name, file in {"all domains": str(tokens), **by_domain(bed, folder)}.items():
        peak = pruned(model, out, method="reap", calibrate=[file])["largest_outputs"][0]
        who = f"expert {peak['expert']} of layer {peak['layer']}"
        print(f"| {name} | {who} | {peak['times']} | {peak['super']} |", flush=True)
    print("\n| planted? | 50 % by | without | with --protect | kept |\n|---|---|---|---|---|")
    for source in (model, planted(model, folder / "planted")):
        meter = Meter(source, val, 1)
        for method, seed in (
            ("random", 0),
            ("random", 1),
            ("random", 2),
            ("frequency", 0),
            ("reap", 0),
        ):
            row = []
            for protect in (False, True):
                told = {"method": method, "seed": seed, "calibrate": [str(tokens)]}
                report = pruned(source, out, protect=protect, **told)
                row.append(f"{meter(out)[0]:.4f}")
            said = [source.name, f"{method} {seed}", *row, str(report["protected"])]
            print(f"| {' | '.join(said)} |", flush=True)
