"""Standard output in any encoding, full, closed, with nobody listening; a working directory that is
gone: no traceback, the output whole, the exit code that a shell expects.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOETOOL = f"{sys.executable} -W ignore -m moetool"
ASCII = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii"


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """A line of bash; the exit code is that of its last moetool."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("moetool ", f"{MOETOOL} ", 1)],
        cwd=folder,
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    for told in (done.stdout, done.stderr):
        assert b"Traceback" not in told and b"a bug in moetool" not in told, told
        assert b"Exception ignored" not in told, told
    return done


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("moetool inspect demo > /dev/full", 1),
        ("PYTHONUNBUFFERED=1 moetool inspect demo --json > /dev/full", 1),
        ("PYTHONUNBUFFERED=1 moetool inspect demo | true", 0),
        ("moetool --help > /dev/full", 1),
        ("moetool inspect demo >&-", 0),
        ("moetool inspect demo | head -1", 0),
        ("moetool methods list | true", 0),
        ("moetool inspect absent 2> /dev/full", 1),
        ("moetool inspect absent --json > /dev/full 2>&1", 1),
        ("moetool inspect absent >&- 2>&-", 1),
        ("moetool upcycle demo --no-such 2>&-", 2),
        ("moetool eval demo --text - <&-", 1),
    ],
)
def test_answers_that_nobody_takes(line: str, code: int, tmp_path: Path) -> None:
    assert shell(line, tmp_path).returncode == code


@pytest.mark.parametrize(
    ("to", "code"),
    [
        ("> /dev/full", 1),
        ("> /dev/full 2>&1", 1),
        (">&-", 0),
        (">&- 2>&-", 0),
        ("<&- >&- 2>&-", 0),
        ("| true", 0),
        ("2> /dev/full", 0),
    ],
)
def test_the_output_is_whole_all_the_same(to: str, code: int, tmp_path: Path) -> None:
    assert shell(f"moetool upcycle demo out {to}", tmp_path).returncode == code
    assert shell("moetool verify out --against demo", tmp_path).returncode == 0


@pytest.mark.parametrize("name", ["caf\u00e9", "\U0001f600"])
def test_names_beyond_ascii(name: str, tmp_path: Path) -> None:
    assert shell(f"{ASCII} moetool upcycle demo {name}", tmp_path).returncode == 0
    said = shell(f"{ASCII} moetool inspect {name} --json", tmp_path)
    assert said.returncode == 0 and json.loads(said.stdout)["kind"] == "moe"
    assert shell(f"moetool verify {name} --against demo", tmp_path).returncode == 0
    assert shell(f"{ASCII} moetool inspect absent-{name}", tmp_path).returncode == 1


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    assert shell(r"moetool upcycle demo $'\xff\xfe'", tmp_path).returncode == 0
    said = shell(r"moetool verify $'\xff\xfe' --against demo --json", tmp_path)
    assert said.returncode == 0 and json.loads(said.stdout)["verified"]


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    gone = "mkdir gone; cd gone; rmdir ../gone; "
    assert shell(f"{gone} moetool inspect demo", tmp_path).returncode == 0
    assert shell(f"{gone} moetool upcycle demo {tmp_path}/out", tmp_path).returncode == 0
    done = shell(f"{gone} moetool upcycle demo out", tmp_path)
    assert done.returncode == 1 and b"working directory is gone" in done.stderr


def test_an_interrupt_while_modules_are_imported_is_a_sentence() -> None:
    code = """
import os, signal, sys
class Early:
    def find_spec(self, name, path=None, target=None):
        if name == "moetool.cli.commands":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Early())
sys.argv = ["moetool", "inspect", "demo"]
from moetool.__main__ import main
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3 and not done.stdout
    assert done.stderr.startswith("error: stopped before anything was written\n  next: ")
