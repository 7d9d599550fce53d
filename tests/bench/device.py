"""The same commands on two devices: `python tests/bench/device.py TESTBED [--device cuda]
[--only commands,forms,loaded]`.

TESTBED is a folder with a trained MoE (qwen3moe-16x4/) and text (text/calibration.jsonl,
text/val.*.jsonl). commands: every verb that computes, on the CPU and on the device, in turn: wall
seconds, whether the outputs have the same bytes, and KL(SRC || OUT) of both on the val files, which
the device computes too. forms: one FFN of SmolLM2's size with experts of each form, against the
CPU's float64 and in time against the dense FFN. loaded: a model packed by bitsandbytes' formats,
run by its kernels, against the same weights in full. Prints tables; a command, not a test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forms import CASES, HIDDEN, block

from moetool import demo

TEXT = ["--calibrate", "text/calibration.jsonl", "--tokens", "16384", "--seq-len", "256"]
DENSE = demo.MODEL
JUDGED = ["--tokens", "24576", "--seq-len", "512"]
WHITE = ["--method", "sub-moe-whitened", "--rank-energy", "0.95", "--no-refit"]
COMMANDS: dict[str, list[str]] = {
    "prune, reap, no refit": ["prune", "--ratio", "0.5", "--no-refit", *TEXT],
    "prune, reap, refit": ["prune", "--ratio", "0.5", *TEXT],
    "prune, no text": ["prune", "--ratio", "0.5"],
    "merge, mean, no refit": ["merge", "--ratio", "0.5", "--combine", "mean", "--no-refit", *TEXT],
    "merge, refit": ["merge", "--ratio", "0.5", *TEXT],
    "prune --method svd": ["prune", "--ratio", "0.5", "--method", "svd", "--no-refit"],
    "quantize int4, gptq": ["quantize", "--format", "int4/128", *TEXT],
    "quantize int4, rtn": ["quantize", "--format", "int4/128"],
    "quantize nf4, rtn": ["quantize", "--format", "nf4", "--search", "none"],
    "quantize fp8, rtn": ["quantize", "--format", "fp8"],
    "quantize mxfp4, rtn": ["quantize", "--format", "mxfp4"],
    "prune naee": ["prune", "--ratio", "0.25", "--method", "naee", *TEXT],
    "merge alike, svd": ["merge", "--ratio", "0.5", "--method", "alike", "--features", "svd"],
    "merge sub-moe, whitened": ["merge", "--ratio", "0.5", *WHITE, *TEXT],
    "prune, sensitivity": ["prune", "--ratio", "0.25", "--budget", "sensitivity", *TEXT],
    "quantize int3, gptq": ["quantize", "--plan", "experts=int3/128", *TEXT],
    "upcycle, kmeans": ["upcycle", "--split", "4", "--experts", "4", "--carve", "kmeans"],
    "upcycle, noise": ["upcycle", "--experts", "4", "--diversify", "noise:0.01"],
    "upcycle, ternary": ["upcycle", "--experts", "4", "--form", "ternary", "--top-k", "1"],
}


def moetool(testbed: Path, words: list[str]) -> Any:
    """What `moetool WORDS --json` says; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", "moetool", *words, "--json"],
        cwd=testbed,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ChildProcessError(
            f"moetool {' '.join(words)}: {done.returncode}\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout)


def weights(folder: Path) -> str:
    """A digest of every byte of the tensor files."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def apart(testbed: Path, out: Path, device: str) -> str:
    """KL to the source in nats a token over the val files."""
    texts = [w for f in sorted((testbed / "text").glob("val.*")) for w in ("--text", str(f))]
    said = moetool(
        testbed,
        ["eval", str(out), "--reference", "qwen3moe-16x4", *texts, *JUDGED, "--device", device],
    )
    return f"{said['kl']:.4f}"


def commands(testbed: Path, device: str, folder: Path, names: list[str]) -> None:
    """Commands on both devices."""
    print(f"| command | cpu, s | {device}, s | bytes | KL of cpu's | KL of {device}'s |")
    print("|---|---|---|---|---|---|")
    for name in names:
        try:
            print(f"| {name} | {both(testbed, device, folder, COMMANDS[name])} |", flush=True)
        except ChildProcessError as problem:
            print(f"| {name} | {problem} |", flush=True)


def both(testbed: Path, device: str, folder: Path, words: list[str]) -> str:
    """The cells of a command."""
    cells, made = [], []
    verb, *rest = words
    source, more = ("", []) if verb == "upcycle" else ("qwen3moe-16x4", [])
    if verb == "upcycle":
        source = str(DENSE)
    if verb == "quantize":
        more = ["--no-loader-check"]
    for at in ("cpu", device):
        out = Path(tempfile.mkdtemp(dir=folder)) / "out"
        begun = time.perf_counter()
        moetool(testbed, [verb, source, str(out), *rest, *more, "--device", at])
        cells.append(f"{time.perf_counter() - begun:.1f}")
        made.append(out)
    same = "same" if weights(made[0]) == weights(made[1]) else "differ"
    judged = [] if verb == "upcycle" else made[: 1 if same == "same" else 2]
    kls = [apart(testbed, out, device) for out in judged] or [""]
    return " | ".join((*cells, same, kls[0], kls[-1]))


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: str, repeat: int = 30) -> float:
    """Median wall seconds, the device awaited."""
    found = []
    for _ in range(repeat + 5):
        wait(device)
        begun = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - begun)
    return statistics.median(found[5:])


def of(module: torch.nn.Module, x: torch.Tensor, device: str) -> float:
    """Of a module on tokens [1, n, hidden]."""
    mine = x.to(device)
    return seconds(lambda: module(mine), device)


@torch.no_grad()
def forms(device: str) -> None:
    """Every form of experts: right on the device, and what it costs there."""
    dense = block(None).to(device)
    print("| form | error to the CPU's | 512 tokens | 1 token | bf16: 4,096 tokens |")
    print("|---|---|---|---|---|")
    many, one, long = (torch.randn(1, n, HIDDEN) for n in (512, 1, 4096))
    base = [of(dense, x, device) for x in (many, one)]
    base.append(of(block(None).to(device, torch.bfloat16), long.to(torch.bfloat16), device))
    print(f"| dense (ms) | | {base[0] * 1e3:.2f} | {base[1] * 1e3:.2f} | {base[2] * 1e3:.2f} |")
    for name, (group, _) in CASES.items():
        here = block(group)
        want = here(many)
        there = block(group).to(device)
        far = float((there(many.to(device)).cpu() - want).abs().max() / want.abs().max())
        cells = [of(there, x, device) / b for x, b in zip((many, one), base, strict=False)]
        cells.append(of(there.to(torch.bfloat16), long.to(torch.bfloat16), device) / base[2])
        print(f"| {name} | {far:.1e} | " + " | ".join(f"{c:.2f}" for c in cells) + " |", flush=True)


@torch.no_grad()
def loaded(testbed: Path, device: str, folder: Path) -> None:
    """Packed by bitsandbytes' formats, run by its kernels."""
    from moetool import load

    print("| format | error of logits, float32 | bytes on the device, of bf16's |")
    print("|---|---|---|")
    source = testbed / "qwen3moe-16x4"
    ids = torch.randint(10, 8000, (2, 128), device=device)
    plain = load(source, dtype=torch.bfloat16).to(device)
    full = sum(p.numel() * p.element_size() for p in plain.parameters())
    for word in ("nf4", "nf4-double", "fp4", "bnb-int8"):
        out, whole = folder / f"load.{word}", folder / f"full.{word}"
        more = [
            "--plan",
            f"experts={word}",
            "--no-loader-check",
        ]  # int8 attention rounds activations
        moetool(testbed, ["quantize", str(source), str(out), *more])
        moetool(testbed, ["dequantize", str(out), str(whole), "--dtype", "float32"])
        want = load(whole, dtype=torch.float32).to(device)(ids).logits
        model = load(out, dtype=torch.float32, device_map=device)
        got = model(ids).logits
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        error = float((got - want).abs().max() / want.abs().max())
        print(f"| {word} | {error:.1e} | {held / full:.3f} |", flush=True)


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__)
    told.add_argument("testbed", type=Path)
    told.add_argument("--device", default="cuda")
    told.add_argument("--only", default="forms,loaded,commands")
    told.add_argument("--commands", default="", help="some of them, by semicolon")
    said = told.parse_args()
    asked = said.only.split(",")
    testbed = said.testbed.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        if "forms" in asked:
            forms(said.device)
        if "loaded" in asked:
            loaded(testbed, said.device, Path(scratch))
        if "commands" in asked:
            names = said.commands.split(";") if said.commands else list(COMMANDS)
            commands(testbed, said.device, Path(scratch), names)


if __name__ == "__main__":
    main()
