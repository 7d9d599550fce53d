"""Two runs never fill one folder: the second is told, and finds nothing changed afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Done, tree

from moetool.errors import MoetoolError
from moetool.lock import NAME, Lock

Run = Callable[..., Done]


def test_one_process_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with Lock.take(folder, "this") as lock:
        with pytest.raises(MoetoolError, match="another moetool process is working on this"):
            Lock.take(folder, "this")
        assert (folder / NAME).exists()
        lock.release()
    assert not folder.exists()
    with Lock.take(folder, "this"):
        (folder / "mine").touch()
    assert [p.name for p in folder.iterdir()] == ["mine"]
    lock = Lock.take(folder, "this")
    del lock
    Lock.take(folder, "this").release()


def test_locks_of_a_killed_process_are_no_locks(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from moetool.lock import Lock; "
        "lock = Lock.take(Path(sys.argv[1]), ''); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert (tmp_path / "a" / NAME).exists()
    Lock.take(tmp_path / "a", "this").release()


def test_no_two_owners_at_once(tmp_path: Path) -> None:
    """Folders and locks come and go while eight threads want them."""
    inside, wrong = [], []

    def want() -> None:
        for _ in range(200):
            try:
                with Lock.take(tmp_path / "a", "this"):
                    inside.append(1)
                    if len(inside) > 1:
                        wrong.append(len(inside))
                    inside.pop()
            except MoetoolError:
                pass

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}\n' * 4)
    return tmp_path / "ids.jsonl"


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Path]:
    """The work folder of tmp_path/out, and a folder of statistics, while others have them."""
    work = tmp_path / ".out.moetool-work"
    with Lock.take(work, ""), Lock.take(tmp_path / "stats", ""):
        yield tmp_path


def test_a_second_run_is_told(
    taken: Path, text: Path, models: Callable[..., Path], moetool: Run
) -> None:
    before = tree(taken)
    done = moetool("prune", models("mixtral"), taken / "out", "--calibrate", text)
    assert done.returncode == 1 and "another moetool process" in done.stderr, done.stderr
    done = moetool("profile", models("mixtral"), taken / "stats", "--calibrate", text)
    assert done.returncode == 1 and "another moetool process" in done.stderr, done.stderr
    assert tree(taken) == before


def test_nothing_is_left_of_a_lock(
    text: Path, models: Callable[..., Path], tmp_path: Path, moetool: Run
) -> None:
    command = ["prune", models("mixtral"), tmp_path / "out", "--calibrate", text]
    assert moetool(*command, "--memory", "1MB").returncode == 1
    assert not list(tmp_path.rglob(NAME))
    assert moetool(*command).returncode == 0
    assert (
        moetool("profile", models("mixtral"), tmp_path / "s", "--calibrate", text).returncode == 0
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.jsonl", "out", "s"]
    assert not list(tmp_path.rglob(NAME))
