"""Blocks that are shared are the bytes that would have been copied, on every file system."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import tree

import moetool as api
from moetool import atomic
from moetool.errors import MoetoolError, Stopped
from moetool.surgery import between, clone
from moetool.surgery.clone import BLOCK, Donors, blocks_of
from moetool.surgery.mover import Copy

Made = Callable[..., Path]


def pretend(source: int, target: int, start: int, to: int, count: int) -> bool:
    """What FICLONERANGE does, with its rules, by copying."""
    assert count and not (start % BLOCK or to % BLOCK or count % BLOCK)
    assert os.pwrite(target, os.pread(source, count, start), to) == count
    return True


def test_whole_blocks_of_a_move() -> None:
    assert blocks_of(0, BLOCK, 3 * BLOCK) == (0, 3 * BLOCK)
    assert blocks_of(100, BLOCK + 100, 3 * BLOCK) == (BLOCK - 100, 2 * BLOCK)
    assert blocks_of(100, BLOCK, 3 * BLOCK) == (0, 0)
    assert blocks_of(100, 100, 50) == (BLOCK - 100, 0)


def test_donors() -> None:
    donors = Donors([Copy("a", 100, 1000, 50, "U8"), Copy("a", 200, 5000, 50, "U8")])
    assert donors.find(Copy("a", 210, 0, 40, "U8")) == 5010
    assert donors.find(Copy("a", 100, 0, 50, "U8")) == 1000
    for start, count in ((210, 41), (90, 20), (140, 20), (300, 1)):
        assert donors.find(Copy("a", start, 0, count, "U8")) is None
    assert donors.find(Copy("b", 210, 0, 40, "U8")) is None


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_the_bytes_are_the_same(
    layout: str, models: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []

    def counted(source: int, target: int, start: int, to: int, count: int) -> bool:
        shared.append(count)
        return pretend(source, target, start, to, count)

    source = str(models("llama"))
    options = {"experts": 4, "top_k": 2, "layout": layout}
    api.upcycle(source, str(tmp_path / "plain"), clone=False, **options)
    monkeypatch.setattr(clone, "clone", counted)
    api.upcycle(source, str(tmp_path / "cloned"), **options)
    plain, cloned = (tree(tmp_path / n)["model.safetensors"] for n in ("plain", "cloned"))
    assert plain == cloned
    again = 3 * sum(
        t.size
        for n, t in api.plan(source, str(tmp_path / "x"), **options).targets.items()
        if ".experts.0." in n
    )
    assert layout == "fused" or sum(shared) >= again > 0


def test_shards_share_with_those_before_them(
    models: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte of an FFN is written once, whichever shards its copies lie in; a run that goes on
    shares with what the one before left.
    """
    shared: list[int] = []

    def counted(source: int, target: int, start: int, to: int, count: int) -> bool:
        shared.append(count)
        return pretend(source, target, start, to, count)

    source = str(models("llama", hidden_size=128, intermediate_size=128))
    options = {"experts": 4, "top_k": 2, "max_shard_size": 200_000, "jobs": 3}
    api.upcycle(source, str(tmp_path / "plain"), clone=False, **options)
    monkeypatch.setattr(clone, "clone", counted)
    api.upcycle(source, str(tmp_path / "cloned"), **options)
    assert shards(tmp_path / "cloned") == shards(tmp_path / "plain")
    planned = api.plan(source, str(tmp_path / "x"), experts=4, top_k=2, max_shard_size=200_000)
    again = 3 * sum(t.size for n, t in planned.targets.items() if ".experts.0." in n)
    assert len(planned.shards) > 5 and sum(shared) >= again
    before, staging = sum(shared), tmp_path / ".resumed.moetool"
    killed = itertools.count()

    def stop(*args: object) -> bool:
        if next(killed) == 6:
            raise OSError("killed")
        return pretend(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(clone, "clone", stop)
    with pytest.raises(MoetoolError, match="killed"):
        api.upcycle(source, str(tmp_path / "resumed"), **(options | {"jobs": 1}))
    assert list(staging.glob("*.safetensors")), "something was finished"
    monkeypatch.setattr(clone, "clone", counted)
    api.upcycle(source, str(tmp_path / "resumed"), **options)
    assert shards(tmp_path / "resumed") == shards(tmp_path / "plain") and sum(shared) > before


def test_who_waits_for_a_shard_that_fails_is_told_to_stop() -> None:
    class Job:
        path, copies, clone = "/x/a" + atomic.SUFFIX, (), True

    turns = between.Turns([Job()])
    with pytest.raises(Stopped):
        turns.wait("/x/a", lambda: True)
    turns.written("/x/a" + atomic.SUFFIX)
    turns.wait("/x/a", lambda: False)
    turns.wait("/x/from-before", lambda: False)


def shards(folder: Path) -> dict[str, str]:
    return {name: seal for name, seal in tree(folder).items() if "safetensors" in name}


def test_data_begins_at_a_block(models: Made, tmp_path: Path) -> None:
    """Equal tensors then lie alike, and outputs can be shared with what is made of them."""
    from safetensors import safe_open

    api.upcycle(str(models("llama")), str(tmp_path / "out"), experts=4)
    file = tmp_path / "out" / "model.safetensors"
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % BLOCK == 0
    with safe_open(file, "pt") as opened:  # the library takes the spaces
        assert len(list(opened.keys())) > 50


def test_a_file_system_that_cannot_is_asked_once_a_file(
    models: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(clone, "clone", lambda *args: bool(asked.append(args)))
    api.upcycle(str(models("llama")), str(tmp_path / "out"), experts=4, jobs=1)
    assert len(asked) <= 2


# --- a real one


@pytest.fixture(scope="module")
def btrfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small btrfs, mounted for these tests."""
    if not shutil.which("mkfs.btrfs") or os.geteuid():
        pytest.skip("needs btrfs-progs, and root to mount")
    image, place = tmp_path_factory.mktemp("image") / "disk", tmp_path_factory.mktemp("btrfs")
    image.touch()
    os.truncate(image, 1 << 30)  # sparse
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_copies_take_no_disk(btrfs: Path, models: Made, tmp_path: Path) -> None:
    source = btrfs / "source"
    shutil.copytree(models("llama", hidden_size=512, intermediate_size=1024), source)
    assert clone.works_in(btrfs)
    api.upcycle(str(source), str(btrfs / "out"), experts=8)
    api.upcycle(str(source), str(tmp_path / "out"), experts=8)
    assert tree(btrfs / "out")["model.safetensors"] == tree(tmp_path / "out")["model.safetensors"]
    size = sum(f.stat().st_size for f in source.iterdir())
    assert used(btrfs / "out") <= 1.3 * size
    api.upcycle(str(source), str(btrfs / "parts"), experts=8, max_shard_size=5_000_000)
    assert len(list((btrfs / "parts").glob("*.safetensors"))) > 8, "no FFN's copies are together"
    assert used(btrfs / "parts") <= 1.3 * size
    api.upcycle(str(source), str(btrfs / "full"), experts=8, clone=False)
    assert used(btrfs / "full") > 3 * size


def used(folder: Path) -> int:
    """Bytes that a folder takes: its own, and those that its files share."""
    os.sync()
    said = subprocess.run(
        ["btrfs", "filesystem", "du", "-s", "--raw", folder], capture_output=True, text=True
    )
    _, exclusive, shared = said.stdout.splitlines()[-1].split()[:3]
    return int(exclusive) + int(shared)


def test_the_disk_must_hold_what_is_not_shared(
    btrfs: Path, models: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(models("llama", hidden_size=512, intermediate_size=1024))
    usage = shutil.disk_usage(btrfs)
    size = sum(f.stat().st_size for f in Path(source).iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    with pytest.raises(MoetoolError, match="not enough space"):
        api.upcycle(source, str(btrfs / "no"), experts=8, clone=False)
    api.upcycle(source, str(btrfs / "yes"), experts=8)
