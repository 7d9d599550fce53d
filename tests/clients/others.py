"""Loaders in environments of their own: where they are, and what they answer."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "transformers4": "reading.py",
    "vllm": "reading_vllm.py",
    "mlx": "reading_mlx.py",
}


def python(loader: str) -> Path:
    """The python of a loader's environment; the test is skipped where there is none."""
    folder = os.environ.get("MOETOOL_CLIENTS", "")
    if not folder:
        pytest.skip("MOETOOL_CLIENTS names no folder of environments (tests/clients/__init__.py)")
    found = Path(folder) / loader / "bin" / "python"
    if not found.exists():
        pytest.skip(f"{found} is not there")
    return found


def ask(loader: str, jobs: Sequence[Sequence[Path]], folder: Path) -> list[dict[str, Any]]:
    """What a loader makes of each job, in one process."""
    asked, answers = folder / f"{loader}-jobs.json", folder / f"{loader}-answers.json"
    asked.write_text(json.dumps([[str(path) for path in job] for job in jobs]))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [python(loader), "-W", "ignore", HERE / SCRIPTS[loader], asked, answers],
        capture_output=True,
        text=True,
        env=env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, (run.returncode, run.stderr[-3000:])
    return json.loads(answers.read_text())
