"""What each site costs and keeps on a real model: `python tests/bench/sites.py MODEL [--folder DIR] [--dtype
float32]`.

Writes groups of experts at every site into MODEL, as it is and in float32, by the command; says how
far its logits are from MODEL's at birth (half of the tokens are of the second modality), what the
command took, and whether its memory stayed within the promise. A command, not a test.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.upcycle import _resident

IMAGE = 5
_COPY = ("--key", "modality", "--modality-ids", str(IMAGE), "--experts", "1", "--top-k", "1")
_FRONT = ("--form", "adapter", "--adapter-at", "before", "--adapter-dim", "8")
WAYS: dict[str, tuple[str, ...]] = {
    "ffn": ("--form", "full", *_COPY),
    "attention": ("--site", "attention", *_COPY),
    "attention, outputs": (
        *("--site", "attention", "--experts", "2", "--top-k", "2", "--law", "soft"),
        *("--attention-mix", "outputs"),
    ),
    "attention, in front": (
        *("--site", "attention", *_FRONT, "--key", "sequence", "--law", "soft"),
        *("--experts", "2", "--adapter-shared-down", "--adapter-groups", "2"),
    ),
    "attention, gate": ("--site", "attention", "--form", "gate", *_COPY[:-2]),
    "heads": ("--site", "heads", "--key", "query"),
    "linear": ("--site", "linear", "--form", "lora", "--rank", "8", "--experts", "4"),
    "norms": ("--site", "norms", *_COPY),
    "final_norm": ("--site", "final_norm", *_COPY),
}


def written(source: Path, out: Path, way: tuple[str, ...]) -> dict[str, Any]:
    """The report of the command, with seconds and largest memory of its process."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "moetool", "upcycle", str(source), str(out), *way, "--json"]
    begun, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.005)
        said.seek(0)
        report: dict[str, Any] = json.loads(said.read())
    return report | {"wall": time.perf_counter() - begun, "rss": peak}


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """In float32, computed in the dtype that the model is stored in."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        made: torch.Tensor = model(input_ids=ids).logits.float()
    del model
    gc.collect()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--dtype", choices=("bf16", "float32"), help="of one of the two alone")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    full, out = args.folder / "float32", args.folder / "out"
    AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").save_pretrained(full)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 40000, (1, 48), generator=draw)
    marked = ids.clone()
    marked[:, ::2] = IMAGE
    print("| site | dtype | logits | text alone | wall s | GB written | memory of promise, MB |")
    print("|---|---|---|---|---|---|---|")
    sources = {"bf16": args.model, "float32": full}
    for dtype in (args.dtype,) if args.dtype else sources:
        source = sources[dtype]
        stock = [logits(source, one) for one in (marked, ids)]
        for name, way in WAYS.items():
            report = written(source, out, way)
            made = [logits(out, one) for one in (marked, ids)]
            far = [
                float((m - s).abs().max() / s.abs().max()) for m, s in zip(made, stock, strict=True)
            ]
            size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e9
            promised = report["peak_memory"] / 2**20
            print(
                f"| {name} | {dtype} | {far[0]:.1e} | {far[1]:.1e} | {report['wall']:.1f} | "
                f"{size:.2f} | {report['rss'] / 2**20:.0f} of {promised:.0f} |",
                flush=True,
            )
            shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
