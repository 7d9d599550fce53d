"""What quantizing keeps: `python tests/bench/quantize.py TESTBED [--only WORDS] [--peer PYTHON]
[--on calibration] [--model FOLDER]`.

TESTBED is a folder with a trained MoE (qwen3moe-16x4/) and text (text/calibration.jsonl with a
`domain` field, text/val.*.jsonl). Solved on 32 x 256 tokens, domains in turn; KL(SRC || OUT) and
perplexity (geometric mean over the files) over 4 x 512 tokens of each val file, float32. `--on
calibration` measures on documents of the calibration file that nothing was solved on: for choosing
between variants, which must not be done on val. `--model`: another model, with the same
text. `--peer`: a Python with llm-compressor, run on the same token ids
(peer_llmcompressor_quantize.py). Prints one table; a command, not a test.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PEER = Path(__file__).parent / "peer_llmcompressor_quantize.py"
SEQUENCES, LENGTH = 32, 256
FILES, EACH, LONG = 6, 4, 512
MIXED = "experts={},attn=int8/128"
# name -> (what quantize is told, what the peer is told)
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "int4/128": ({"format": "int4/128"}, ["int4/128"]),
    "int4/64": ({"format": "int4/64"}, ["int4/64"]),
    "int4/32": ({"format": "int4/32"}, ["int4/32"]),
    "experts int4, attn int8": ({"plan": MIXED.format("int4/128")}, ["int4/128", "int8/128"]),
    "int3/128": ({"format": "int3/128"}, ["int3/128"]),
    "experts int3, attn int8": ({"plan": MIXED.format("int3/128")}, ["int3/128", "int8/128"]),
    "int2/64": ({"format": "int2/64"}, ["int2/64"]),
    "experts int2, attn int8": ({"plan": MIXED.format("int2/64")}, ["int2/64", "int8/128"]),
    "int8/channel": ({"format": "int8/channel"}, []),
    "fp8": ({"format": "fp8"}, []),
    "mxfp4": ({"format": "mxfp4"}, []),
    "nf4": ({"format": "nf4"}, []),
    "gguf:q4_0": ({"format": "gguf:q4_0"}, []),
}


class Meter:
    """Holds models against a reference on the same text; the reference is run once."""

    def __init__(self, reference: Path, files: list[Path], each: int = EACH) -> None:
        from moetool.evaluate import perplexity
        from moetool.forward.batches import Cut
        from moetool.forward.profile import Calibration
        from moetool.surgery.checkpoint import Checkpoint

        self.walked = lambda name, at: perplexity._walked(
            name, at, self.batches, perplexity.ANY_ROOM.budget(name, 0), lambda *_: None, None
        )
        source = Checkpoint.open(reference)
        cut = Cut(FILES * each * LONG, LONG, shuffle=False)
        self.batches = Calibration(tuple(map(str, files)), cut).read(source)
        self.reference = self.walked("reference", source)

    def __call__(self, out: Path) -> tuple[float, float, float]:
        """(KL, geometric mean perplexity, top-1 agreement)."""
        from moetool.evaluate import perplexity
        from moetool.forward import answers
        from moetool.surgery.checkpoint import Checkpoint

        model = self.walked("model", Checkpoint.open(out))
        sums = perplexity._sums([self.reference, model], self.batches, lambda *_: None, None)
        everything = answers.Sums()
        for one in sums:
            everything.add(one)
        found = everything.row(True)
        each = [math.log(s.row(True)["perplexity"]) for s in sums]
        return found["kl"], math.exp(statistics.mean(each)), found["top1_agreement"]


def documents(bed: Path) -> Iterator[dict[str, Any]]:
    """Of the calibration file, domains in turn, those that are too short left out."""
    by_domain: dict[str, list[dict[str, Any]]] = {}
    for line in (bed / "text" / "calibration.jsonl").open():
        row = json.loads(line)
        by_domain.setdefault(row["domain"], []).append(row)
    for turn in zip(*(by_domain[d] for d in sorted(by_domain)), strict=False):
        yield from turn


def texts(bed: Path, folder: Path, words: Any) -> tuple[Path, list[Path]]:
    """(token ids to solve on, a sequence a line; files to measure variants on: other documents)."""
    rows, rest = [], {}
    for row in documents(bed):
        ids = words.encode(row["text"], add_special_tokens=False)
        if len(rows) < SEQUENCES and len(ids) >= LENGTH:
            rows.append({"input_ids": ids[:LENGTH]})
        else:
            rest.setdefault(row["domain"], []).append(row)
    solve_on = folder / "tokens.jsonl"
    solve_on.write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = []
    for domain, kept in sorted(rest.items()):
        files.append(folder / f"held.{domain}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in kept))
    return solve_on, files


def quantized(
    source: Path, out: Path, tokens: Path, **options: Any
) -> tuple[dict[str, Any], float]:
    """(report, CPU seconds) of one run in this process."""
    import moetool

    shutil.rmtree(out, ignore_errors=True)
    if options.get("method") != "rtn":
        text = {"calibrate": [str(tokens)], "tokens": SEQUENCES * LENGTH, "pack": False}
        options = options | text | {"seq_len": LENGTH}
    before = time.process_time()
    report = moetool.quantize(str(source), str(out), **options)
    return report, time.process_time() - before


def megabytes(out: Path) -> float:
    return (
        sum(p.stat().st_size for p in out.iterdir() if p.suffix in (".safetensors", ".gguf")) / 1e6
    )


def row(name: str, how: str, out: Path, meter: Meter, cpu: float) -> None:
    kl, perplexity, same = meter(out)
    shown = [
        name,
        how,
        f"{megabytes(out):.2f}",
        f"{kl:.5f}",
        f"{perplexity:.2f}",
        f"{same:.3f}",
        f"{cpu:.1f}",
    ]
    print("| " + " | ".join(shown) + " |", flush=True)


def peer(python: str, source: Path, tokens: Path, how: str, out: Path, formats: list[str]) -> float:
    """CPU seconds of llm-compressor's calibration and rounding."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    call = [python, str(PEER), str(source), str(tokens), how, str(out), *formats]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(json.loads(done.stdout.splitlines()[-1])["cpu"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--only", default="", help="cases, by comma")
    parser.add_argument("--methods", default="rtn,gptq")
    parser.add_argument("--peer", default="", help="a Python with llm-compressor")
    parser.add_argument("--on", default="val", choices=("val", "calibration"))
    parser.add_argument("--model", type=Path, help="another model than the testbed's")
    parser.add_argument("--more", default="{}", help="JSON of further options of gptq")
    told = parser.parse_args()
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    source = told.model or told.testbed / "qwen3moe-16x4"
    folder = Path(tempfile.mkdtemp(prefix="quantize-bench-"))
    tokens, held = texts(told.testbed, folder, AutoTokenizer.from_pretrained(source))
    val = sorted((told.testbed / "text").glob("val.*.jsonl"))
    meter = Meter(source, val if told.on == "val" else held)
    print("| format | by | MB | KL | perplexity | top-1 | CPU s |\n|" + "---|" * 7)
    for name in told.only.split(";") if told.only else CASES:
        options, theirs = CASES[name]
        for method in told.methods.split(","):
            more = json.loads(told.more) if method == "gptq" else {}
            _, cpu = quantized(source, folder / "out", tokens, method=method, **options, **more)
            row(name, f"moetool {method}", folder / "out", meter, cpu)
        for how in ("rtn", "gptq") if told.peer and theirs else ():
            cpu = peer(told.peer, source, tokens, how, folder / "peer", theirs)
            row(name, f"llm-compressor {how}", folder / "peer", meter, cpu)
            shutil.rmtree(folder / "peer")
    shutil.rmtree(folder)
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
