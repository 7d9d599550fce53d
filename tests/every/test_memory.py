"""The memory promise: kept by measurement, refused beforehand when it cannot be."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import moetool

RUN = """
import json, pathlib, resource, sys
limit = int(sys.argv[1])
if limit: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
import moetool
from moetool import pipeline
from moetool.methods.prepared import Options
from moetool.methods.options import Common
prepared = pipeline.prepare(Options(out=sys.argv[3], sources=(sys.argv[2],), method=sys.argv[5], values=json.loads(sys.argv[4]), common=Common(jobs=1)))
pipeline.write(prepared)
print(json.dumps({"promised": prepared.peak, "used": 1024 * int(next(x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1]), "bytes": prepared.plan.disk}))
"""


def big_llama(folder: Path, *, layers: int, hidden: int = 1024, width: int = 4096) -> Path:
    """A Llama of zeros in a sparse file: large to read, free to store."""
    return zeros(folder, layers, hidden, {"mlp": width}, LLAMA)


def big_mixture(folder: Path, *, layers: int, hidden: int, width: int, experts: int) -> Path:
    """A Qwen3-MoE of zeros."""
    ffns = {f"mlp.experts.{e}": width for e in range(experts)}
    counts = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": width}
    return zeros(folder, layers, hidden, ffns, QWEN | counts)


LLAMA: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN: dict[str, object] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def zeros(
    folder: Path, layers: int, hidden: int, ffns: dict[str, int], told: dict[str, object]
) -> Path:
    """A model of zeros; ffns: the width of each of a layer's FFNs."""
    folder.mkdir()
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [4096, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [4096, hidden],
    }
    experts = int(str(told.get("num_experts", 0)))
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": [hidden],
            p + "post_attention_layernorm.weight": [hidden],
        }
        shapes |= {p + f"self_attn.{x}_proj.weight": [hidden, hidden] for x in "qkvo"}
        if experts:
            shapes |= {p + f"self_attn.{x}_norm.weight": [hidden // 8] for x in "qk"}
            shapes[p + "mlp.gate.weight"] = [experts, hidden]
        for name, width in ffns.items():
            shapes |= {
                p + name + ".gate_proj.weight": [width, hidden],
                p + name + ".up_proj.weight": [width, hidden],
                p + name + ".down_proj.weight": [hidden, width],
            }
    write_zeros(folder / "model.safetensors", shapes)
    config = {
        "hidden_size": hidden,
        "intermediate_size": max(ffns.values()),
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": hidden // 8,
        "vocab_size": 4096,
    }
    (folder / "config.json").write_text(json.dumps(told | config))
    return folder


def write_zeros(path: Path, shapes: dict[str, list[int]]) -> None:
    """A sparse file: large to read, free to store."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    body = json.dumps(header).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(body)) + body)
        out.truncate(8 + len(body) + position)


def run(
    limit: int, source: Path, out: Path, verb: str = "upcycle", **options: object
) -> dict[str, int]:
    """Run in a process whose private memory the kernel limits."""
    env = {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(limit), str(source), str(out), json.dumps(options), verb],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_many_times_larger_than_memory(tmp_path: Path) -> None:
    """0.9 GB in, 2.3 GB out, under a hard limit of 100 MB of private memory."""
    source = big_llama(tmp_path / "source", layers=26)
    measured = run(100_000_000, source, tmp_path / "out", experts=3)
    assert measured["bytes"] > 20 * 100_000_000
    assert measured["used"] <= measured["promised"] <= 100_000_000


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 8, "split": 4, "top_k": 4},
        {"experts": 8, "split": 4, "top_k": 4, "layout": "fused"},
        {"experts": 4, "diversify": "permute+drop:0.5+noise:0.1"},
        {"experts": 8, "split": 4, "top_k": 4, "carve": "random"},
        {"experts": 8, "split": 4, "top_k": 4, "target": "glm4_moe", "shared": True},
        {"experts": 8, "split": 4, "top_k": 4, "carve": "kmeans:gate"},
    ],
    ids=["split", "fused", "diversify", "random", "shared", "kmeans"],
)
def test_measured_within_promise(options: dict[str, object], tmp_path: Path) -> None:
    """Computed methods, one layer's matrices at a time: peak RSS at most 1.1 of the promise,
    whatever the depth.
    """
    source = big_llama(
        tmp_path / "source",
        layers=3 if "diversify" in options or "kmeans" in str(options) else 6,
        hidden=2048,
        width=8192,
    )
    measured = run(0, source, tmp_path / "out", **options)
    assert measured["used"] <= 1.1 * measured["promised"], measured
    assert measured["promised"] < measured["bytes"]


def test_a_layer_in_a_shared_basis_within_promise(tmp_path: Path) -> None:
    """One layer and what its SVD needs, whatever the depth."""
    source = big_mixture(tmp_path / "source", layers=2, hidden=768, width=256, experts=48)
    measured = run(0, source, tmp_path / "out", "prune", method="svd", ratio=0.5)
    layer = 2 * 48 * 3 * 256 * 768
    assert measured["used"] <= measured["promised"] < 550_000_000 + 2.5 * layer, measured


@pytest.mark.slow
def test_a_refit_within_promise(tmp_path: Path) -> None:
    """Routers of zeros send all tokens to the same two wide experts."""
    source = big_mixture(tmp_path / "source", layers=1, hidden=128, width=1024, experts=8)
    told = {"calibrate": ["random"], "seq_len": 512, "tokens": 32_768, "ratio": 0.5}
    measured = run(0, source, tmp_path / "out", "prune", refit_tokens=32_768, **told)
    assert measured["used"] <= measured["promised"], measured


@pytest.mark.slow
@pytest.mark.parametrize("carve", ["activation", "importance"])
def test_a_carve_by_text_within_promise(carve: str, tmp_path: Path) -> None:
    """One layer, its marks and the assignment of its neurons; or its graph, and clusters of tokens."""
    source = big_llama(tmp_path / "source", layers=2)
    told = {"carve": carve, "split": 8, "top_k": 2, "calibrate": ["random"]}
    measured = run(0, source, tmp_path / "out", seq_len=512, tokens=4096, **told)
    assert measured["used"] <= measured["promised"] < 3_000_000_000, measured


def test_too_little_is_refused_before_writing(tmp_path: Path) -> None:
    source = big_llama(tmp_path / "source", layers=2)
    with pytest.raises(moetool.MoetoolError, match="does not fit into --memory") as refused:
        moetool.upcycle(str(source), str(tmp_path / "out"), memory=20_000_000)
    assert "at least" in str(refused.value) and not list(tmp_path.glob(".out*"))


def test_clustering_is_refused_before_it_reads(tmp_path: Path) -> None:
    source = big_llama(tmp_path / "source", layers=2)
    with pytest.raises(moetool.MoetoolError, match="clustering does not fit"):
        moetool.upcycle(
            str(source),
            str(tmp_path / "out"),
            experts=4,
            split=4,
            top_k=4,
            carve="kmeans",
            memory=100_000_000,
        )


def test_memory_chooses_the_workers(tmp_path: Path) -> None:
    source = big_llama(tmp_path / "source", layers=2)
    options = {"experts": 8, "split": 4, "top_k": 4, "jobs": 8, "dry_run": True}
    free = moetool.upcycle(str(source), str(tmp_path / "out"), **options)
    tight = moetool.upcycle(
        str(source), str(tmp_path / "out"), memory=free["peak_memory"] - 1, **options
    )
    assert (
        free["jobs"] == 8 and 1 <= tight["jobs"] < 8 and tight["peak_memory"] < free["peak_memory"]
    )
