"""prune, merge and quantize under stress: killed at every rename, missed gates, little memory, other
workers, dry runs.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import command, inside, tree
from test_memory import RUN

import moetool

UNLOADED = "--no-loader-check"  # a process of seconds for each of twenty runs
REFIT = ["--method", "reap", "--refit", "--refit-tokens", "400"]
CALLS = {
    "prune": ["prune", "--ratio", "0.5", "--method", "reap", "--no-refit"],
    "refit": ["prune", "--ratio", "0.5", *REFIT],
    "merge": ["merge", "--ratio", "0.5", "--method", "m-smoe", "--sample", "100"],
    "extend": ["extend"],
    "quantize": ["quantize", "--format", "int4/16", "--max-shard-size", "100kB", UNLOADED],
}
OF_THE_RUN = ("moetool.json", "README.md", "report.json")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "ids.jsonl"
    dice = np.random.default_rng(3)
    path.write_text(
        "".join(
            json.dumps({"input_ids": dice.integers(10, 150, 40).tolist()}) + "\n" for _ in range(12)
        )
    )
    return path


def call(kind: str, source: Path, out: Path, text: Path, *more: str) -> list[str]:
    verb, *options = CALLS[kind]
    return [
        verb,
        str(source),
        str(out),
        *options,
        "--calibrate",
        str(text),
        "--tokens",
        "400",
        "--seq-len",
        "40",
        *(["--max-shard-size", "300kB"] if kind != "quantize" else []),
        "--quiet",
        *more,
    ]


def same(a: Path, b: Path) -> bool:
    """Byte-identical but for what names the folder or the run."""
    one, two = tree(a), tree(b)
    return one.keys() == two.keys() and all(one[k] == two[k] for k in one if k not in OF_THE_RUN)


# Imports everything once, then runs the same command again and again in forked children that die at
# their n-th rename, each followed by a whole run.
FORKER = """
import json, os, shutil, signal, sys, warnings
warnings.simplefilter("ignore")
import accelerate, scipy.cluster.hierarchy, torch, transformers
from transformers import Qwen3MoeForCausalLM
import moetool.forward.walk, moetool.evaluate.gate, moetool.methods.reduce.solving
import moetool.methods.quantize.parts.solving
from moetool.cli import main
torch.set_num_threads(1)
moetool.forward.walk.KEPT_FIRST = float("inf")  # on a slow machine as on a fast one
root, args = sys.argv[1], sys.argv[2:]
real = os.replace
def child(argv, at, when):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    left = [at]
    def replace(*a, **k):
        left[0] -= 1
        if left[0] == 0 and when == "before": os.kill(os.getpid(), signal.SIGKILL)
        real(*a, **k)
        if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace
    os._exit(main(argv))
seen = []
for number in range(1, 200):
    out = os.path.join(root, str(number), "whole")
    os.mkdir(os.path.dirname(out))
    argv = [out if a == "OUT" else a for a in args]
    status = child(argv, number, "before" if number % 2 else "after")
    loadable = os.path.exists(os.path.join(out, "config.json"))
    if os.WIFEXITED(status):
        seen.append([number, os.WEXITSTATUS(status), loadable, -1])
        break
    seen.append([number, -os.WTERMSIG(status), loadable, os.waitstatus_to_exitcode(child(argv, 0, "never"))])
print(json.dumps(seen))
"""


@pytest.mark.parametrize("kind", CALLS)
def test_kill_at_every_rename(
    kind: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Statistics, hidden states, decisions, solved tensors, shards: whatever was renamed last, the
    same command ends with the same bytes.
    """
    args = call(kind, models("qwen3_moe", num_hidden_layers=3), Path("OUT"), text)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKER, str(tmp_path), *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    *killed, last = json.loads(run.stdout.splitlines()[-1])
    assert last[1] == 0 and len(killed) >= (12 if kind == "refit" else 8)
    whole = tmp_path / str(last[0]) / "whole"
    for number, status, _, again in killed:
        assert status == -signal.SIGKILL and again == 0, (number, run.stderr)
        assert same(tmp_path / str(number) / "whole", whole), number
        assert [p.name for p in (tmp_path / str(number)).iterdir()] == ["whole"]
    assert sum(loadable for _, _, loadable, _ in killed) <= 1  # only after the very last rename


def test_ctrl_c_in_the_walk_keeps_layers(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Exit code 3, a sentence, and the second run starts from the third layer."""
    source = models("qwen3_moe")
    script = """
import os, signal, sys
from moetool.forward import walk
from moetool.forward.walk import Walk
walk.KEPT_FIRST = float("inf")
real = Walk._layer
def layer(self, number, eyes):
    if number == 2: os.kill(os.getpid(), signal.SIGINT)
    real(self, number, eyes)
Walk._layer = layer
from moetool.cli import main
sys.exit(main(sys.argv[1:]))
"""
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            script,
            *call("prune", source, tmp_path / "out", text),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        run.returncode == 3 and "same command again" in run.stderr and "Traceback" not in run.stderr
    ), run.stderr
    work = tmp_path / ".out.moetool-work" / "stats"
    assert (work / "hidden-00002.bin").exists() and (work / "layer-00001.safetensors").exists()
    done = command(*[a for a in call("prune", source, tmp_path / "out", text) if a != "--quiet"])
    assert done.returncode == 0 and "layer 0 of" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("kind", CALLS)
def test_workers_and_hash_seeds_change_nothing(
    kind: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = models("qwen3_moe")
    for jobs, seed in (("1", "0"), ("4", "1")):
        (tmp_path / jobs).mkdir()
        assert (
            command(
                *call(kind, source, tmp_path / jobs / "out", text, "--jobs", jobs),
                env={"PYTHONHASHSEED": seed},
            ).returncode
            == 0
        )
    assert same(tmp_path / "1" / "out", tmp_path / "4" / "out")


@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_a_missed_gate_leaves_nothing(
    verb: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = models("mixtral")
    wanted = [
        verb,
        source,
        tmp_path / "out",
        "--ratio",
        "0.5",
        "--max-kl",
        "1e-9",
        "--text",
        text,
        "--seq-len",
        "40",
    ]
    done = inside(*wanted)
    assert (
        done.returncode == 4
        and "KL divergence" in done.stderr
        and "at most" in done.stderr
        and "next:" in done.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == [".out.moetool-work"]  # of the text; no model
    assert "keeps what was found on the text" in done.stderr
    assert not list(tmp_path.rglob("config.json"))
    wide = inside(*[a if a != "1e-9" else "100" for a in wanted], "--json")
    assert (
        wide.returncode == 0
        and 0 < wide.json["quality"]["kl"] < 100
        and wide.json["quality"]["held_out"]
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quality"]["kl"] == wide.json["quality"]["kl"] and report["peak_rss"] > 10**7


def test_a_gate_without_text_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    done = inside("prune", models("mixtral"), tmp_path / "out", "--max-kl", "0.1")
    assert done.returncode == 2 and "needs text" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_dry_run_with_text_leaves_nothing(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    done = inside(
        *[a for a in call("refit", models("mixtral"), tmp_path / "out", text) if a != "--quiet"],
        "--dry-run",
    )
    assert (
        done.returncode == 0
        and "8 -> 4 experts a layer (50 % removed)" in done.stdout
        and "nothing was written" in done.stdout
    )
    assert list(tmp_path.iterdir()) == []


def test_propagation_sees_changed_layers(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """The first layer is decided alike, later scores differ, and the bytes are still copies."""
    source = str(models("qwen3_moe"))
    options: dict[str, Any] = {
        "ratio": 0.5,
        "calibrate": [str(text)],
        "tokens": 400,
        "seq_len": 40,
        "method": "reap",
        "refit": False,
    }
    plain = moetool.prune(source, str(tmp_path / "plain"), **options)["decisions"]["layers"]
    moved = moetool.prune(source, str(tmp_path / "moved"), propagate=True, **options)["decisions"][
        "layers"
    ]
    assert np.allclose(plain["1"]["scores"], moved["1"]["scores"], rtol=1e-4) and not np.allclose(
        plain["3"]["scores"], moved["3"]["scores"], rtol=1e-3
    )
    assert (
        moetool.verify(str(tmp_path / "moved"), against=[source])["bytes"]["computed_tensors"] == 0
    )


@pytest.mark.parametrize("more", [{"propagate": True}, {"refit": True}], ids=str)
def test_two_files_walk_as_one(
    more: dict[str, Any], models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Statistics inside the walk are kept for each file, and decided on their sum."""
    lines = text.read_text().splitlines(keepends=True)
    halves = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    halves[0].write_text("".join(lines[:6]))
    halves[1].write_text("".join(lines[6:]))
    common: dict[str, Any] = {"method": "reap", "ratio": 0.5, "seq_len": 40, **more}
    source, names = str(models("qwen3_moe")), [str(h) for h in halves]
    one = moetool.prune(source, str(tmp_path / "one"), calibrate=str(text), **common)
    two = moetool.prune(source, str(tmp_path / "two"), calibrate=names, **common)
    assert [f["tokens"] for f in two["data"]["files"]] == [240, 240]
    for number, layer in one["decisions"]["layers"].items():
        other = two["decisions"]["layers"][number]
        assert np.allclose(layer["scores"], other["scores"], rtol=1e-3)
        assert sum(one["tokens_per_expert"][number]) == sum(two["tokens_per_expert"][number])


def test_a_damaged_refit_is_found(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = models("mixtral")
    assert inside(*call("refit", source, tmp_path / "out", text)).returncode == 0
    assert inside("verify", tmp_path / "out", "--against", source, "--no-load").returncode == 0
    from moetool.surgery.checkpoint import Checkpoint

    stored = Checkpoint.open(tmp_path / "out").tensors[
        "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    ]
    with (tmp_path / "out" / stored.file).open("r+b") as file:
        file.seek(stored.start)
        file.write(b"\x01\x02\x03")
    done = inside("verify", tmp_path / "out", "--against", source, "--no-load")
    assert done.returncode == 4 and "experts.0.w2.weight" in done.stderr and "solved" in done.stderr


def big_moe(
    folder: Path, *, layers: int, experts: int = 16, hidden: int = 1024, width: int = 1024
) -> Path:
    """A Qwen3-MoE of zeros in a sparse file: large to read, free to store."""
    import struct

    folder.mkdir()
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [1000, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [1000, hidden],
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": [hidden],
            p + "post_attention_layernorm.weight": [hidden],
            p + "mlp.gate.weight": [experts, hidden],
        }
        shapes |= {p + "self_attn.q_norm.weight": [64], p + "self_attn.k_norm.weight": [64]}
        shapes |= {
            p + f"self_attn.{x}_proj.weight": [
                512 if x in "qkv" else hidden,
                hidden if x in "qkv" else 512,
            ]
            for x in "qkvo"
        }
        for e in range(experts):
            shapes |= {
                f"{p}mlp.experts.{e}.{m}_proj.weight": [hidden, width]
                if m == "down"
                else [width, hidden]
                for m in ("gate", "up", "down")
            }
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    body = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(body)) + body)
        out.truncate(8 + len(body) + position)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 1000,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measured(source: Path, out: Path, verb: str, limit: int = 0, **options: Any) -> dict[str, int]:
    """Peak RSS and promise of a run in a process of its own, its private memory limited by the
    kernel.
    """
    script = (
        RUN.replace("method=sys.argv[5]", f'method="{verb}"')
        .replace("jobs=1)", f"jobs=1, memory={limit or None})")
        .replace("limit = int(sys.argv[1])", "limit = 0")
    )
    env = {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "2",
        "MALLOC_ARENA_MAX": "1",
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            script,
            "0",
            str(source),
            str(out),
            json.dumps(options),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_pruning_without_text_takes_the_memory_of_a_copy(tmp_path: Path) -> None:
    source = big_moe(tmp_path / "m", layers=12)
    found = measured(source, tmp_path / "out", "prune", ratio=0.5, method="router-distance")
    assert found["used"] <= found["promised"] <= 120_000_000 and found["bytes"] > 500_000_000


def test_the_walk_does_not_grow_with_depth(text: Path, tmp_path: Path) -> None:
    """4 and 16 layers of one width: the same promise and nearly the same peak, within it. A peak
    is the lowest of up to three runs: what the allocator happens to hold on to is no property of
    the walk, growth with depth would be there in every run.
    """
    options = {"ratio": 0.5, "method": "reap", "calibrate": str(text), "tokens": 400, "seq_len": 40}
    options["own_share"] = 0  # what a model writes itself needs it whole
    models = {layers: big_moe(tmp_path / f"m{layers}", layers=layers) for layers in (4, 16)}
    seen: dict[int, dict[str, int]] = {}
    for number in range(3):
        for layers, model in models.items():
            found = measured(model, tmp_path / f"out{layers}-{number}", "prune", **options)
            seen[layers] = min(seen.get(layers, found), found, key=lambda f: f["used"])
        if seen[16]["used"] < 1.1 * seen[4]["used"] and all(
            f["used"] <= 1.1 * f["promised"] for f in seen.values()
        ):
            break
    assert all(f["used"] <= 1.1 * f["promised"] for f in seen.values()), seen
    assert (
        seen[16]["used"] < 1.1 * seen[4]["used"]
        and abs(seen[16]["promised"] - seen[4]["promised"]) < 0.02 * seen[4]["promised"]
    ), seen
    assert seen[16]["used"] < seen[16]["bytes"] + 600_000_000


def test_too_little_memory_for_text_is_refused(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    done = inside(*call("prune", models("mixtral"), tmp_path / "out", text, "--memory", "300MB"))
    assert (
        done.returncode == 1
        and "does not fit into --memory" in done.stderr
        and "at least" in done.stderr
    )
    assert not (tmp_path / "out").exists()
