"""What pruning and merging cost and keep: `python tests/bench/compress.py TESTBED [--llmcompressor
PYTHON] [--only ways,protect,quality,speed,memory,cluster]`.

ways: the table that README and `methods list` show (tests/bench/ways.py); protect: super experts
(tests/bench/protect.py).

TESTBED is a folder with a trained MoE (qwen3moe-16x4/) and text (text/calibration.jsonl,
text/val.*.jsonl). Quality: KL and perplexity (geometric mean over the val files) of every method
at 25 % and 50 %, next to llm-compressor's REAP on the same token ids. Prints tables; a command,
not a test.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.protect import measure as measure_protect
from tests.bench.ways import measure as measure_ways

PEER = Path(__file__).parent / "peer_llmcompressor.py"
TOKENS, LENGTH, EVAL = 65_536, 512, 6 * 8 * 512
# verb, options: what is measured for quality, each at both ratios.
CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("prune", {"method": m})
        for m in (
            "random",
            "frequency",
            "gate-mass",
            "ean",
            "easy-ep",
            "reap",
            "naee",
            "router-distance",
        )
    ),
    ("prune", {"method": "reap", "propagate": True, "protect": False}),
    ("prune", {"method": "naee", "propagate": True}),
    ("prune", {"method": "reap", "refit": True}),
    ("prune", {"method": "naee", "refit": True}),
    *(
        ("merge", {"method": m})
        for m in (
            "alike",
            "hc-smoe",
            "m-smoe",
            "sub-moe",
            "sub-moe-whitened",
            "ream",
            "mergemoe",
            "d2-moe",
        )
    ),
    ("merge", {"method": "hc-smoe", "combine": "least-squares"}),
    ("merge", {"method": "ream", "combine": "ties"}),
]


def table(head: list[str], rows: list[list[Any]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(c) for c in row) + " |", flush=True)


def token_file(bed: Path, folder: Path) -> Path:
    """The calibration text as token ids, one sequence a line: both tools read these."""
    from moetool.forward.batches import Cut
    from moetool.forward.profile import Calibration
    from moetool.surgery.checkpoint import Checkpoint

    batches = Calibration((str(bed / "text" / "calibration.jsonl"),), Cut(TOKENS, LENGTH)).read(
        Checkpoint.open(bed / "qwen3moe-16x4")
    )
    path = folder / "tokens.jsonl"
    path.write_text(
        "".join(
            json.dumps({"input_ids": row.tolist()}) + "\n" for b in batches.batches for row in b.ids
        )
    )
    return path


def measure(bed: Path, out: Path) -> tuple[float, float, float]:
    """(KL, geometric mean perplexity, top-1 agreement) on the held-out text."""
    import moetool

    found = moetool.eval(
        str(out),
        text=sorted(map(str, (bed / "text").glob("val.*.jsonl"))),
        reference=str(bed / "qwen3moe-16x4"),
        tokens=EVAL,
        seq_len=LENGTH,
    )
    return (
        found["kl"],
        math.exp(statistics.mean(math.log(f["perplexity"]) for f in found["files"])),
        found["top1_agreement"],
    )


def reduce(
    verb: str, bed: Path, out: Path, tokens: Path, stats: Path | None = None, **options: Any
) -> tuple[dict[str, Any], float, float]:
    """(report, wall, CPU seconds) of one run in this process."""
    import moetool

    shutil.rmtree(out, ignore_errors=True)
    wall, cpu = time.perf_counter(), time.process_time()
    text = (
        {"stats": str(stats)}
        if stats
        else {"calibrate": [str(tokens)], "tokens": TOKENS, "seq_len": LENGTH, "pack": False}
    )
    if "least-squares" not in options.values() and options["method"] != "mergemoe":
        options.setdefault("refit", False)
    report = getattr(moetool, verb)(str(bed / "qwen3moe-16x4"), str(out), **text, **options)
    return report, time.perf_counter() - wall, time.process_time() - cpu


def peer(python: str, bed: Path, tokens: Path, ratio: float, out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [python, str(PEER), str(bed / "qwen3moe-16x4"), str(tokens), str(ratio), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def quality(bed: Path, folder: Path, python: str) -> None:
    tokens, rows = token_file(bed, folder), []
    import moetool

    shutil.rmtree(folder / "stats", ignore_errors=True)
    wall, cpu = time.perf_counter(), time.process_time()
    moetool.profile(
        str(bed / "qwen3moe-16x4"),
        str(folder / "stats"),
        calibrate=[str(tokens)],
        tokens=TOKENS,
        seq_len=LENGTH,
        pack=False,
        covariance=True,
    )
    print(
        f"one profile for all methods marked *: {time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} CPU s",
        flush=True,
    )
    for ratio in (0.25, 0.5):
        theirs: dict[str, Any] | None = None
        if python:
            theirs = peer(python, bed, tokens, ratio, folder / "peer")
            kl, ppl, top = measure(bed, folder / "peer")
            rows.append(
                [
                    f"{ratio:.0%}",
                    "llm-compressor REAP",
                    f"{kl:.4f}",
                    f"{ppl:.2f}",
                    f"{top:.1%}",
                    f"{theirs['wall']:.0f}",
                    f"{theirs['cpu']:.0f}",
                    "",
                    "",
                ]
            )
        for verb, options in CASES:
            walks = (
                options.get("propagate")
                or options.get("refit")
                or "mergemoe" in options.values()
                or "least-squares" in options.values()
            )
            report, wall, cpu = reduce(
                verb,
                bed,
                folder / "out",
                tokens,
                None if walks else folder / "stats",
                ratio=ratio,
                **options,
            )
            kl, ppl, top = measure(bed, folder / "out")
            same = ""
            if (
                theirs and options["method"] == "reap" and options.get("propagate")
            ):  # the peer prunes each layer before it looks at the next
                same = (
                    "yes"
                    if {n: v["keep"] for n, v in report["decisions"]["layers"].items()}
                    == theirs["kept"]
                    else "no"
                )
            name = (
                f"{verb} "
                + " ".join(
                    str(v)
                    if k == "method"
                    else k
                    if v is True
                    else f"no-{k}"
                    if v is False
                    else f"{k}={v}"
                    for k, v in options.items()
                )
                + ("" if walks else " *")
            )
            rows.append(
                [
                    f"{ratio:.0%}",
                    name,
                    f"{kl:.4f}",
                    f"{ppl:.2f}",
                    f"{top:.1%}",
                    f"{wall:.0f}",
                    f"{cpu:.0f}",
                    f"{report['expert_bytes_after'] / report['expert_bytes_before']:.2f}",
                    same,
                ]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    table(
        [
            "removed",
            "tool and method",
            "KL",
            "perplexity",
            "same top-1",
            "wall s",
            "CPU s",
            "expert bytes",
            "experts of the peer",
        ],
        rows,
    )


def speed(bed: Path, folder: Path, python: str, rounds: int) -> None:
    """CPU seconds of calibrating and pruning, interleaved, medians; loading of libraries is not
    counted for either.
    """
    tokens = token_file(bed, folder)
    reduce("prune", bed, folder / "warm", tokens, ratio=0.25, method="reap")
    seen: dict[str, list[tuple[float, float]]] = {
        "moetool": [],
        "moetool --propagate": [],
        "llm-compressor": [],
    }
    for _ in range(rounds):
        for name, more in (
            ("moetool", {}),
            ("moetool --propagate", {"propagate": True, "protect": False}),
        ):
            _, wall, cpu = reduce(
                "prune", bed, folder / "out", tokens, ratio=0.25, method="reap", **more
            )
            seen[name].append((wall, cpu))
        if python:
            found = peer(python, bed, tokens, 0.25, folder / "peer")
            seen["llm-compressor"].append((found["wall"], found["cpu"]))
    table(
        ["REAP, 25 %, 65,536 tokens", "wall s", "CPU s"],
        [
            [
                n,
                f"{statistics.median(w for w, _ in v):.1f}",
                f"{statistics.median(c for _, c in v):.1f}",
            ]
            for n, v in seen.items()
            if v
        ],
    )


def big_moe(folder: Path, layers: int, experts: int, hidden: int, width: int) -> Path:
    """A random Qwen3-MoE in bf16, in four shards, written without torch; its text is token ids."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (4000, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (4000, hidden),
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "mlp.gate.weight": (experts, hidden),
        }
        shapes |= {p + "self_attn.q_norm.weight": (128,), p + "self_attn.k_norm.weight": (128,)}
        shapes |= {
            p + f"self_attn.{x}_proj.weight": (hidden, 1024) if x == "o" else (1024, hidden)
            for x in "qkvo"
        }
        for e in range(experts):
            shapes |= {
                f"{p}mlp.experts.{e}.{m}_proj.weight": (hidden, width)
                if m == "down"
                else (width, hidden)
                for m in ("gate", "up", "down")
            }
    block = (
        (np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * 0.02).view(np.uint32)
        >> 16
    ).astype("<u2")
    names, index, shards = sorted(shapes), {}, 4
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, position, mine = {}, 0, names[number::shards]
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
            for i, tensor in enumerate(mine):
                left = int(np.prod(shapes[tensor]))
                while left:
                    step = min(left, len(block) - i % 7919)
                    out.write(block[i % 7919 : i % 7919 + step].tobytes())
                    left -= step
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "hidden_size": hidden,
                "intermediate_size": width,
                "moe_intermediate_size": width,
                "num_hidden_layers": layers,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 4000,
                "num_experts": experts,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "max_position_embeddings": 4096,
            }
        )
    )
    dice = np.random.default_rng(1)
    (folder / "ids.jsonl").write_text(
        "".join(
            json.dumps({"input_ids": dice.integers(0, 4000, 512).tolist()}) + "\n"
            for _ in range(32)
        )
    )
    return folder


def limited(args: list[str], limit: int) -> tuple[int, float, int, str]:
    """(exit code, seconds, peak RSS, stderr) of a moetool command whose private memory the kernel
    limits.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moetool", *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
        if limit
        else None,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    _, said = process.communicate()
    _, status, used = 0, process.returncode, resource.getrusage(resource.RUSAGE_CHILDREN)
    return status, time.perf_counter() - begun, used.ru_maxrss * 1024, said


def memory(folder: Path) -> None:
    rows = []
    for layers in (8, 32):
        model = big_moe(folder / f"deep{layers}", layers, 32, 1024, 512)
        code, seconds, used, said = _apart(
            [
                "prune",
                str(model),
                str(folder / "out"),
                "--ratio",
                "0.5",
                "--calibrate",
                str(model / "ids.jsonl"),
                "--tokens",
                "8192",
                "--seq-len",
                "512",
                "--overwrite",
                "--quiet",
            ],
            0,
        )
        rows.append(
            [
                f"reap with text, {layers} layers",
                f"{_size(model) / 1e9:.2f}",
                "-",
                code,
                f"{seconds:.0f}",
                f"{used / 1e6:.0f}",
            ]
        )
        shutil.rmtree(folder / "out", ignore_errors=True)
    model = big_moe(folder / "twelve", 24, 64, 2048, 640)
    for name, more in (
        ("without text", []),
        (
            "reap with text",
            [
                "--calibrate",
                str(model / "ids.jsonl"),
                "--tokens",
                "1024",
                "--seq-len",
                "512",
                "--batch-tokens",
                "1024",
                "--memory",
                "1.45GB",
            ],
        ),
    ):
        code, seconds, used, said = _apart(
            [
                "prune",
                str(model),
                str(folder / "out"),
                "--ratio",
                "0.5",
                "--overwrite",
                "--quiet",
                *more,
            ],
            2_000_000_000,
        )
        rows.append(
            [
                f"12 GB, 2 GB limit, {name}",
                f"{_size(model) / 1e9:.2f}",
                "2.0 GB",
                code,
                f"{seconds:.0f}",
                f"{used / 1e6:.0f}",
            ]
        )
        print(said[-300:], file=sys.stderr)
        shutil.rmtree(folder / "out", ignore_errors=True)
    table(["case", "GB in", "limit (RLIMIT_DATA)", "exit code", "wall s", "peak RSS MB"], rows)


def _apart(args: list[str], limit: int) -> tuple[int, float, int, str]:
    """`limited` in a process of its own, so that each run's peak is its own."""
    script = f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import compress; print(json.dumps(compress.limited({args!r}, {limit})))"
    return tuple(
        json.loads(
            subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=True
            ).stdout
        )
    )


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def clustering() -> None:
    from moetool.kernels import cluster

    dice = np.random.default_rng(0)
    begun = time.perf_counter()
    for _ in range(48):
        outputs = dice.standard_normal((128, 2048))
        cluster.agglomerative(cluster.distances(outputs), 64, "average")
    table(
        ["average linkage", "seconds"],
        [["128 experts x 48 layers, features of 2048", f"{time.perf_counter() - begun:.2f}"]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path)
    parser.add_argument(
        "--llmcompressor",
        default="",
        metavar="PYTHON",
        help="python of a virtual environment with llmcompressor",
    )
    parser.add_argument("--only", default="ways,protect,quality,speed,memory,cluster")
    parser.add_argument("--again", action="store_true", help="ways: measure what stands there too")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/moetool-bench-compress"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.only.split(","):
        {
            "ways": lambda: measure_ways(args.testbed, args.folder, args.again),
            "protect": lambda: measure_protect(args.testbed, args.folder),
            "quality": lambda: quality(args.testbed, args.folder, args.llmcompressor),
            "speed": lambda: speed(args.testbed, args.folder, args.llmcompressor, args.rounds),
            "memory": lambda: memory(args.folder),
            "cluster": clustering,
        }[name]()
        print()


if __name__ == "__main__":
    main()
