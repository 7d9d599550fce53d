"""The disk holds an output before it gets its name, and a disk that fails is no success."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Done, tree

Run = Callable[..., Done]

SHIM = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
static int left = -1;
int fsync(int handle) {
    if (left < 0) left = atoi(getenv("FSYNC_LEFT"));
    if (left-- == 0) { errno = EIO; return -1; }
    return 0;
}
"""


def test_everything_is_synced_before_it_is_named(
    models: Callable[..., Path], tmp_path: Path, moetool: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(source: str, target: str) -> None:
        done.append("name " + Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    command = ["prune", models("mixtral"), tmp_path / "out", "--method", "router-distance"]
    assert moetool(*command).returncode == 0
    shard = done.index("sync model.safetensors.tmp")
    assert shard < done.index("name model.safetensors")
    last = done.index("name out")
    for name in ("config.json", "moetool.json", "model.safetensors", ".out.moetool"):
        assert done.index("sync " + name) < last
    assert done[last + 1] == "sync " + tmp_path.name
    done.clear()
    assert moetool(*command, "--overwrite", "--no-sync").returncode == 0
    assert not [d for d in done if d.startswith("sync")]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("left", [0, 1, 4])
def test_a_disk_that_fails_is_said(
    left: int, models: Callable[..., Path], tmp_path: Path, moetool: Run
) -> None:
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c"], check=True)
    env = {"LD_PRELOAD": str(shim), "FSYNC_LEFT": str(left)}
    command = ["prune", models("mixtral"), tmp_path / "out", "--method", "router-distance"]
    done = moetool(*command, env=env)
    assert done.returncode == 1 and "next:" in done.stderr, (done.returncode, done.stderr)
    assert "Input/output error" in done.stderr and not (tmp_path / "out").exists()
    assert moetool(*command).returncode == 0
    assert moetool("verify", tmp_path / "out", "--against", models("mixtral")).returncode == 0


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    """A file as a file system; the test is skipped where the machine does not let us."""
    at.mkdir()
    done = subprocess.run(["mount", "-o", "loop", image, at], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop devices here: {done.stderr.decode(errors='replace').strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mkfs.ext4"), reason="needs root, ext4")
def test_a_power_cut_after_success_loses_nothing(tmp_path: Path, moetool: Run) -> None:
    """What the disk holds at the moment the command ends, mounted as after a power cut: without
    syncs the names are there and the bytes are not.
    """
    disk, cut = tmp_path / "disk", tmp_path / "cut"
    with disk.open("wb") as handle:
        handle.truncate(100 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    with mounted(disk, tmp_path / "before") as folder:
        assert moetool("upcycle", "demo", folder / "out").returncode == 0
        shutil.copyfile(disk, cut)
        written = tree(folder / "out")
    with mounted(cut, tmp_path / "after") as folder:
        assert tree(folder / "out") == written
