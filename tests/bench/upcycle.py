"""How fast and how small: `python tests/bench/upcycle.py [--folder DIR] [--rounds 5] [--mergekit
PATH]`.

Makes random bfloat16 Llamas, then measures in one run, interleaved: `cp` of the same bytes,
moetool, and mergekit-moe where it is given. Wall and CPU are medians, RSS the largest. Prints one
table. Needs about 35 GB of disk with the default size; a command, not a test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from moetool.demo import MODEL

SIZES = {
    "full": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "vocab_size": 8000,
    },
}
SHARDS = 4


def make_llama(folder: Path, size: dict[str, int], seed: int) -> Path:
    """A random Llama, bf16, in four shards, written without torch."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    h, f, n, v = (
        size["hidden_size"],
        size["intermediate_size"],
        size["num_hidden_layers"],
        size["vocab_size"],
    )
    shapes = {
        "model.embed_tokens.weight": (v, h),
        "model.norm.weight": (h,),
        "lm_head.weight": (v, h),
    }
    for i in range(n):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        shapes |= {
            p + f"self_attn.{x}_proj.weight": (h if x in "qo" else h // 4, h) for x in "qkvo"
        }
        shapes |= {
            p + "mlp.gate_proj.weight": (f, h),
            p + "mlp.up_proj.weight": (f, h),
            p + "mlp.down_proj.weight": (h, f),
        }
    rng = np.random.default_rng(seed)
    block = ((rng.standard_normal(1 << 22, dtype=np.float32) * 0.02).view(np.uint32) >> 16).astype(
        np.uint16
    )
    names = sorted(shapes)
    index: dict[str, str] = {}
    for number in range(SHARDS):
        mine = names[number::SHARDS]
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, position = {}, 0
        for tensor in mine:
            count = int(np.prod(shapes[tensor])) * 2
            header[tensor] = {
                "dtype": "BF16",
                "shape": list(shapes[tensor]),
                "data_offsets": [position, position + count],
            }
            position += count
            index[tensor] = name
        body = json.dumps(header).encode()
        with (folder / name).open("wb") as out:
            out.write(struct.pack("<Q", len(body)) + body)
            for tensor in mine:
                left = int(np.prod(shapes[tensor]))
                while left:
                    step = min(left, len(block))
                    out.write(np.roll(block[:step], int(rng.integers(1 << 20))).tobytes())
                    left -= step
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **size,
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):  # mergekit does not start without one
        shutil.copy(MODEL / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(command: list[str], out: Path) -> dict[str, float]:
    """Wall, CPU seconds, largest RSS and bytes written of one command; the output is removed
    before and after.
    """
    for left in (out, out.with_name(f".{out.name}.moetool")):
        shutil.rmtree(left, ignore_errors=True)
    if "cp" in " ".join(command[:3]):
        out.mkdir(parents=True)
    os.sync()
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, _resident(process.pid))
        time.sleep(0.005)
    wall = time.perf_counter() - begun
    if status:
        raise SystemExit(
            f"{command} failed: {(process.stderr.read() if process.stderr else b'').decode()[-800:]}"
        )
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) if out.exists() else 0
    shutil.rmtree(out, ignore_errors=True)
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "rss": peak, "bytes": size}


def _resident(pid: int) -> int:
    """Largest RSS so far in bytes (VmHWM; wait4's figure would include this process, from before
    exec).
    """
    try:
        line = next(
            x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM")
        )
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def cases(
    args: argparse.Namespace, folder: Path, models: list[Path]
) -> list[tuple[str, str, list[str]]]:
    """(case, tool, command); `cp` copies as many bytes as the case writes (within 2 %), from the
    same files.
    """
    moetool = [sys.executable, "-m", "moetool", "upcycle"]
    out = str(folder / "out")
    froms = [x for m in models for x in ("--from", str(m))]
    found = []
    found.append(("4 models -> 4 experts", "cp", ["cp", "-r", *map(str, models[:3]), out]))
    found.append(
        (
            "4 models -> 4 experts",
            "moetool",
            [*moetool, str(models[0]), out, *froms, "--experts", "4"],
        )
    )
    if args.mergekit:
        config = folder / "mergekit.yml"
        config.write_text(
            "base_model: "
            + str(models[0])
            + "\ngate_mode: random\ndtype: bfloat16\nexperts:\n"
            + "".join(f"  - source_model: {m}\n    positive_prompts: ['']\n" for m in models)
        )
        found.append(
            (
                "4 models -> 4 experts",
                "mergekit-moe",
                [args.mergekit, str(config), out, "--random-seed", "1", "--device", "cpu"],
            )
        )
    found.append(
        (
            "1 model -> 8 copies",
            "cp",
            [
                "sh",
                "-c",
                f"cd {out} && for i in 1 2 3 4 5; do cp -r {models[0]} $i; done; cp {models[0]}/*[123]-of-* .",
            ],
        )
    )
    found.append(
        ("1 model -> 8 copies", "moetool", [*moetool, str(models[0]), out, "--experts", "8"])
    )
    return found


def small_things(folder: Path, models: list[Path]) -> list[tuple[str, str, list[str]]]:
    moetool = [sys.executable, "-m", "moetool"]
    many = folder / "many"
    if not many.exists():
        _many_tensors(many)
    return [
        ("--help", "moetool", [*moetool, "--help"]),
        ("inspect of 45,000 tensors", "moetool", [*moetool, "inspect", str(many)]),
        (
            "--dry-run of the 8 copies",
            "moetool",
            [*moetool, "upcycle", str(models[0]), str(folder / "out"), "--dry-run"],
        ),
    ]


def _many_tensors(folder: Path) -> None:
    """A Qwen3-MoE of 58 layers x 256 experts (44,544 expert tensors), one byte range each."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    position = 0
    for layer in range(58):
        for expert in range(256):
            for name, shape in (("gate_proj", (2, 4)), ("up_proj", (2, 4)), ("down_proj", (4, 2))):
                header[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = {
                    "dtype": "BF16",
                    "shape": shape,
                    "data_offsets": [position, position + 16],
                }
                position += 16
    body = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(body)) + body + bytes(position)
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen3_moe",
                "num_hidden_layers": 58,
                "num_experts": 256,
                "num_experts_per_tok": 8,
                "hidden_size": 4,
                "moe_intermediate_size": 2,
            }
        )
    )


def main() -> None:
    """Make the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", default="/tmp/moetool-bench", help="where models and outputs go"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--mergekit",
        default=shutil.which("mergekit-moe"),
        help="path of mergekit-moe, if it is to be measured",
    )
    args = parser.parse_args()
    folder = Path(args.folder) / args.size
    models = [make_llama(folder / f"llama-{i}", SIZES[args.size], i) for i in range(4)]
    runs = cases(args, folder, models) + small_things(folder, models)
    results: dict[tuple[str, str], list[dict[str, float]]] = {(c, t): [] for c, t, _ in runs}
    for _ in range(args.rounds):
        for case, tool, command in runs:
            results[case, tool].append(measure(command, folder / "out"))
    print(
        f"{'case':28} {'tool':14} {'wall s':>8} {'min':>7} {'CPU s':>7} {'RSS MB':>8} {'GB':>6} {'x cp':>6}"
    )
    for (case, tool), found in results.items():
        wall = statistics.median(f["wall"] for f in found)
        base = (
            statistics.median(f["wall"] / f["bytes"] for f in results[case, "cp"])
            * found[0]["bytes"]
            if (case, "cp") in results
            else None
        )
        print(
            f"{case:28} {tool:14} {wall:8.2f} {min(f['wall'] for f in found):7.2f} {statistics.median(f['cpu'] for f in found):7.2f} {max(f['rss'] for f in found) / 1e6:8.1f} {found[0]['bytes'] / 1e9:6.2f} {f'{wall / base:6.2f}' if base else '     -'}"
        )


if __name__ == "__main__":
    main()
