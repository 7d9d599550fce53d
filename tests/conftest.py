"""Fixtures every test may use. Nothing here, and no test, reaches the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Tiny models gain nothing from a second thread, and two that wait for each other on a busy
# machine take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import hashlib
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import slow
import tiny


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what tests/slow.py says; the table itself is checked when everything is collected."""
    for item in items:
        if slow.is_slow(item.nodeid):
            item.add_marker(pytest.mark.slow)
    if config.args == config.getini("testpaths"):
        wrong = slow.faults(item.nodeid for item in items)
        if wrong:
            raise pytest.UsageError("tests/slow.py: " + "; ".join(wrong))


@pytest.fixture(autouse=True)
def loader_is_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests marked `loads` start another process for transformers, or hold what was upcycled
    against its source: it takes seconds.
    """
    if request.node.get_closest_marker("loads") is None:
        from moetool.evaluate import measured

        monkeypatch.setattr(measured, "_loaded", lambda *args: None)
        monkeypatch.setattr(measured, "_born", lambda *args: measured.Measured())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """models("llama") -> folder of a tiny random model, made once a session; keyword arguments
    change its config.
    """
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def get(family: str, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
        key = f"{family}-{seed}-{dtype}-{hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]}"
        if key not in made:
            made[key] = tiny.save(family, root / key, seed=seed, dtype=dtype, **overrides)
        return made[key]

    return get


@pytest.fixture
def llama(models: Callable[..., Path]) -> Path:
    """A tiny random Llama, float32."""
    return models("llama")


class Done(subprocess.CompletedProcess[str]):
    """A finished command."""

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def command(
    *args: object, timeout: float = 240, env: dict[str, str] | None = None, **kwargs: Any
) -> Done:
    """Run `moetool ARGS` as a user would, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "moetool", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
        **kwargs,
    )
    done = Done(run.args, run.returncode, run.stdout, run.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def inside(*args: object) -> Done:
    """The same command line in this process: seconds sooner, because nothing is imported again.

    For tests of what a command does; `command` is for those that are about the process (signals,
    imports, the environment, memory).
    """
    from moetool.cli import main

    words = [str(a) for a in args]
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
        warnings.simplefilter("ignore")
        code = main(words)
    done = Done(["moetool", *words], code, out.getvalue(), err.getvalue())
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def moetool() -> Callable[..., Done]:
    """Run a command line in this process; with env, cwd or timeout in one of its own."""

    def run(*args: object, **kwargs: Any) -> Done:
        return command(*args, **kwargs) if kwargs else inside(*args)

    return run


def tree(folder: Path) -> dict[str, str]:
    """name -> sha256 of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
