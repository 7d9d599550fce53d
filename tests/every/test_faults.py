"""Killed at every rename, stopped by signals, out of space, two at once: resumed byte-identical or
refused; nothing half-made loads.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import command, inside, tree

import moetool

# A sitecustomize that dies at the n-th os.replace, before or after it.
KILLER = """
import os, signal, sys, threading
real, left, lock = os.replace, [int(os.environ["KILL_AT"])], threading.Lock()
def replace(*args, **kwargs):
    with lock:
        left[0] -= 1
        if left[0] == 0 and os.environ["KILL_WHEN"] == "before": os.kill(os.getpid(), signal.SIGKILL)
        real(*args, **kwargs)
        if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
from moetool.cli import main
sys.exit(main(sys.argv[1:]))
"""
METHODS: dict[str, list[str]] = {
    "copies": ["--experts", "4"],
    "groups": ["--experts", "8", "--split", "4", "--top-k", "4", "--carve", "random"],
    "shared": ["--experts", "4", "--shared", "--split", "2"],
    "drop": ["--experts", "4", "--diversify", "permute+drop:0.5+noise:0.1"],
}
SMALL = ["--max-shard-size", "200kB", "--quiet"]


def upcycle(source: Path, out: Path, *options: str) -> list[str]:
    return ["upcycle", str(source), str(out), *options, *SMALL]


def loadable(folder: Path) -> bool:
    return (folder / "config.json").exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_at_every_rename(when: str, llama: Path, tmp_path: Path) -> None:
    assert inside(*upcycle(llama, tmp_path / "whole", *METHODS["copies"])).returncode == 0
    whole = tree(tmp_path / "whole")
    survived = 0
    for number in range(1, 200):
        (tmp_path / str(number)).mkdir()
        out = tmp_path / str(number) / "whole"
        run = subprocess.run(
            [sys.executable, "-c", KILLER, *upcycle(llama, out, *METHODS["copies"])],
            env={**os.environ, "KILL_AT": str(number), "KILL_WHEN": when},
            capture_output=True,
            check=False,
        )
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert not loadable(out) or tree(out).keys() == whole.keys()
        again = inside(*upcycle(llama, out, *METHODS["copies"]))
        assert again.returncode == 0, again.stderr
        assert _same(tree(out), whole)
        survived += 1
    assert survived >= len([n for n in whole if n.endswith(".safetensors")]) + 4


def _same(a: dict[str, str], b: dict[str, str]) -> bool:
    """moetool.json and the card hold the command line, which names another folder."""
    return {k: v for k, v in a.items() if k not in ("moetool.json", "README.md")} == {
        k: v for k, v in b.items() if k not in ("moetool.json", "README.md")
    } and a.keys() == b.keys()


@pytest.mark.parametrize("method", METHODS)
def test_random_kills_and_resume(method: str, llama: Path, tmp_path: Path) -> None:
    """SIGKILL, SIGTERM and SIGINT at random moments, then the same command: the bytes of an
    undisturbed run.
    """
    assert inside(*upcycle(llama, tmp_path / "whole", *METHODS[method])).returncode == 0
    dice = random.Random(method)
    out = tmp_path / "out"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-m", "moetool", *upcycle(llama, out, *METHODS[method])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(dice.uniform(0.05, 0.6 if method == "copies" else 3.0))
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode in (0, 3, -signal.SIGKILL, -number), said
        assert "Traceback" not in said or process.returncode == -number
        if not out.exists():
            assert not list(tmp_path.glob("out/config.json"))
    assert inside(*upcycle(llama, out, *METHODS[method])).returncode == 0
    assert _same(tree(out), tree(tmp_path / "whole"))


def test_ctrl_c_while_writing_is_resumable(models: Callable[..., Path], tmp_path: Path) -> None:
    """Exit code 3, finished shards kept, the rerun uses them."""
    source = models(
        "llama", hidden_size=256, intermediate_size=2048, num_attention_heads=8, num_hidden_layers=6
    )
    script = "import os, sys, time\nreal = os.replace\ndef slow(*a):\n    real(*a)\n    time.sleep(0.3)\nos.replace = slow\nfrom moetool.cli import main\nsys.exit(main(sys.argv[1:]))"
    args = [
        "upcycle",
        str(source),
        str(tmp_path / "out"),
        "--experts",
        "4",
        "--max-shard-size",
        "8MB",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    staging = tmp_path / ".out.moetool"
    for _ in range(400):
        if len(list(staging.glob("model-*.safetensors"))) >= 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3 and "same command again" in said, said
    assert not (tmp_path / "out").exists() and list(staging.glob("model-*.safetensors"))
    done = inside(*args, "--json")
    assert done.returncode == 0 and done.json["resumed_shards"] >= 2


@pytest.mark.parametrize("method", METHODS)
def test_workers_and_hash_seeds_change_nothing(method: str, llama: Path, tmp_path: Path) -> None:
    seen = []
    for jobs, seed in ((1, "0"), (4, "1"), (2, "2")):
        (tmp_path / str(jobs)).mkdir()
        run = command(
            *upcycle(llama, tmp_path / str(jobs) / "out", *METHODS[method], "--jobs", str(jobs)),
            env={"PYTHONHASHSEED": seed},
        )
        assert run.returncode == 0, run.stderr
        seen.append(
            {
                k: v
                for k, v in tree(tmp_path / str(jobs) / "out").items()
                if k not in ("moetool.json", "README.md")
            }
        )
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) > 5


def test_another_seed_gives_other_bytes(llama: Path, tmp_path: Path) -> None:
    a = moetool.upcycle(str(llama), str(tmp_path / "a"), seed=0)
    b = moetool.upcycle(str(llama), str(tmp_path / "b"), seed=1)
    assert a["plan_digest"] != b["plan_digest"]


def test_another_plans_staging_is_refused(llama: Path, tmp_path: Path) -> None:
    script = KILLER
    subprocess.run(
        [sys.executable, "-c", script, *upcycle(llama, tmp_path / "out", "--experts", "4")],
        env={**os.environ, "KILL_AT": "2", "KILL_WHEN": "after"},
        capture_output=True,
        check=False,
    )
    assert (tmp_path / ".out.moetool").is_dir()
    done = inside(*upcycle(llama, tmp_path / "out", "--experts", "8"))
    assert done.returncode == 1 and "another plan" in done.stderr and "--overwrite" in done.stderr
    assert (
        inside(*upcycle(llama, tmp_path / "out", "--experts", "8"), "--overwrite").returncode == 0
    )
    assert not (tmp_path / ".out.moetool").exists()


def test_leftovers_without_a_state_file_do_not_slip_in(llama: Path, tmp_path: Path) -> None:
    """Killed just before the last rename (the state file is gone by then), then another plan for
    the same folder.
    """
    last = "import os, signal, sys\nreal = os.replace\ndef replace(a, b):\n    if str(b).endswith('/out'): os.kill(os.getpid(), signal.SIGKILL)\n    real(a, b)\nos.replace = replace\nfrom moetool.cli import main\nsys.exit(main(sys.argv[1:]))"
    subprocess.run(
        [sys.executable, "-c", last, *upcycle(llama, tmp_path / "out", "--experts", "4")],
        capture_output=True,
        check=False,
    )
    assert (tmp_path / ".out.moetool" / "config.json").exists() and not (
        tmp_path / ".out.moetool" / "moetool-staging.json"
    ).exists()
    other = inside(*upcycle(llama, tmp_path / "out", "--experts", "2"))
    assert other.returncode == 1 and "another plan" in other.stderr
    assert inside(*upcycle(llama, tmp_path / "out", "--experts", "4")).returncode == 0
    assert moetool.verify(str(tmp_path / "out"))["verified"] == "structure"


def test_changed_source_is_not_resumed(llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    subprocess.run(
        [sys.executable, "-c", KILLER, *upcycle(source, tmp_path / "out")],
        env={**os.environ, "KILL_AT": "2", "KILL_WHEN": "after"},
        capture_output=True,
        check=False,
    )
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (source / "model.safetensors").write_bytes(data)
    done = inside(*upcycle(source, tmp_path / "out"))
    assert done.returncode == 1 and "sources have changed" in done.stderr


def test_rerun_of_a_finished_output_says_so(llama: Path, tmp_path: Path) -> None:
    assert inside(*upcycle(llama, tmp_path / "out")).returncode == 0
    before = tree(tmp_path / "out")
    again = inside("upcycle", llama, tmp_path / "out", "--max-shard-size", "200kB")
    assert (
        again.returncode == 0
        and "already there" in again.stderr
        and tree(tmp_path / "out") == before
    )


def test_two_at_once(llama: Path, tmp_path: Path) -> None:
    from moetool import pipeline
    from moetool.methods.prepared import Options
    from moetool.surgery.writer import Writer

    prepared = pipeline.prepare(
        Options(out=str(tmp_path / "out"), sources=(str(llama),), method="upcycle")
    )
    with Writer(tmp_path / "out", prepared.plan, sources=prepared.sources):
        done = inside("upcycle", llama, tmp_path / "out")
        assert done.returncode == 1 and "another moetool process" in done.stderr
    assert inside("upcycle", llama, tmp_path / "out").returncode == 0


def test_disk_full_in_the_middle(llama: Path, tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse a write; finished shards stay, the rerun ends the
    work.
    """
    limited = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))\nfrom moetool.cli import main\nsys.exit(main(sys.argv[1:]))"
    args = [
        "upcycle",
        str(llama),
        str(tmp_path / "out"),
        "--experts",
        "4",
        "--max-shard-size",
        "100kB",
    ]
    run = subprocess.run(
        [sys.executable, "-c", limited, *args[:-1], "900kB"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        run.returncode == 1
        and "finished shards are kept" in run.stderr
        and "Traceback" not in run.stderr
    )
    assert not (tmp_path / "out").exists()
    assert inside(*args[:-1], "900kB").returncode == 0


def test_no_space_is_known_before(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(moetool.MoetoolError, match="not enough space"):
        moetool.upcycle(str(llama), str(tmp_path / "out"))
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("out", "code", "word"),
    [
        ("SRC", 2, "must not be a source"),
        ("SRC/inside", 2, "lie in one"),
        ("SRC/..", 2, "hold one"),
        ("full", 2, "not empty"),
        ("file", 2, "is a file"),
    ],
)
def test_wrong_targets(out: str, code: int, word: str, llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "SRC"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    done = inside("upcycle", source, tmp_path / out)
    assert done.returncode == code and word in done.stderr and "next:" in done.stderr
    assert tree(tmp_path) == before


def test_overwrite_replaces_the_whole_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_text("x")
    assert inside("upcycle", llama, tmp_path / "out", "--overwrite").returncode == 0
    assert not (tmp_path / "out" / "stale.safetensors").exists() and loadable(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_read_only_target(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(moetool.MoetoolError, match="permission denied"):
        moetool.upcycle(str(llama), str(tmp_path / "out"))


def test_files_follow_the_umask_and_are_reproducible(llama: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        moetool.upcycle(str(llama), str(tmp_path / "a"))
        moetool.upcycle(str(llama), str(tmp_path / "b"))
    finally:
        os.umask(old)
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "a").iterdir()}
    assert modes == {0o640}
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert {k for k in a if a[k] != b[k]} <= {"README.md", "moetool.json"}  # they name the folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_not_finite(
    value: float,
    dtype: str,
    models: Callable[..., Path],
    tmp_path: Path,
    moetool: Callable[..., Any],
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(models("llama", dtype=dtype), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][7, 3] = torch.tensor(value)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    strict = moetool("upcycle", source, tmp_path / "out", "--strict")
    assert (
        strict.returncode == 1
        and "model.layers.2.mlp.up_proj.weight" in strict.stderr
        and not (tmp_path / "out").exists()
    )
    loose = moetool("upcycle", source, tmp_path / "out")
    assert (
        loose.returncode == 0
        and "warning:" in loose.stderr
        and "model.layers.2.mlp.up_proj.weight" in loose.stderr
    )
    assert "none: a source holds NaN or inf (else exact: " in loose.stdout + loose.stderr
    again = moetool("upcycle", source, tmp_path / "out", "--json")
    assert again.json["certificate"]["level"] == "none" and again.json["seconds"] == 0
    words = ("--against", source, "--no-load")
    assert moetool("verify", tmp_path / "out", *words).returncode == 0
