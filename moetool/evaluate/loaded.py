"""Does the named loader compute with what we wrote? A truncated copy is loaded in a process of its
own, and every parameter compared by value with our decoding: that it loads proves nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moetool.data import JsonObject
from moetool.errors import Stopped, VerificationFailed
from moetool.evaluate.truncated import Truncated
from moetool.methods.options import CHECKED
from moetool.methods.proof import Loaded
from moetool.progress import Progress, Stage, silent
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.units import show_bytes

MAJOR = "5."  # of transformers, for the loader of this name
LIBRARIES = 900_000_000  # resident bytes of transformers, compressed-tensors and bitsandbytes
SAME = 2.0**-8  # the rounding of what is decoded to bfloat16
LOGITS = 0.25  # activations that are rounded too move them by some percent
_PACKAGES = {"compressed-tensors": "compressed-tensors", "bitsandbytes": "bitsandbytes"}
_KILLED = -9


@dataclass(frozen=True)
class Within:
    """Where and how the loader may work. memory: bytes it may take; None: what is free."""

    folder: str | None = None
    memory: int | None = None
    tell: Progress = silent
    stop: threading.Event | None = None


def check(source: Checkpoint, config: JsonObject, loader: str, within: Within = Within()) -> Loaded:
    """Load a truncated copy of a checkpoint whose whole config is `config`, and compare. What
    cannot be done is said in the answer; VerificationFailed where loader and we disagree.
    """
    why = _unavailable(source, loader)
    if why:
        return Loaded(loader, why=why)
    cut = Truncated.of(source, config)
    if cut is None:
        return Loaded(loader, why="layers of this family cannot be cut off")
    needed, free = cut.memory + LIBRARIES, within.memory or _free()
    if free is not None and needed > free:
        why = f"{cut.layers} layers need {show_bytes(needed)} of memory, of {show_bytes(free)}"
        return Loaded(loader, why=why)
    within.tell(Stage("load"), 0, 1)
    with tempfile.TemporaryDirectory(prefix=".moetool-load-", dir=within.folder) as made:
        packed, plain = Path(made) / "packed", Path(made) / "plain"
        for folder in (packed, plain):
            folder.mkdir()
        cut.write(packed, plain)
        answer = _run([packed, plain, Path(made) / "answer.json"], within)
    within.tell(Stage("load"), 1, 1)
    return _judged(source, loader, cut, answer)


def _unavailable(source: Checkpoint, loader: str) -> str:
    """Why this loader cannot be asked here; empty where it can."""
    if loader not in CHECKED:
        return f"{loader} is not run here"
    installed = _version("transformers")
    if not installed.startswith(MAJOR):
        return f"transformers 5 is not installed: pip install 'transformers>={MAJOR}0'"
    methods = {forms.named(name).quant_method for name in source.told}
    for method in sorted(methods & set(_PACKAGES)):
        if not _version(_PACKAGES[method]):
            return f"{method} is not installed: pip install {_PACKAGES[method]}"
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _free() -> int | None:
    """Bytes of memory that a new process can have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return int(found.split()[1]) * 1024 if found else None


def _run(arguments: list[Path], within: Within) -> JsonObject:
    """The answer of the other process, and how it ended."""
    command = [sys.executable, "-m", "moetool.evaluate.loading", *map(str, arguments)]
    with subprocess.Popen(
        command, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            while True:
                try:
                    _, said = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    if within.stop is not None and within.stop.is_set():
                        raise Stopped("stopped", hint="run the same command again") from None
        except BaseException:
            process.kill()
            raise
    path = arguments[-1]
    answer: JsonObject = json.loads(path.read_text()) if path.exists() else {"step": "start"}
    last = said.decode(errors="replace").strip().splitlines()[-1:]
    return answer | {"code": process.returncode, "last": last[0] if last else ""}


def _environment() -> Mapping[str, str]:
    """This process's, quiet, without the network, and with this very package."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(paths)}


def _judged(source: Checkpoint, loader: str, cut: Truncated, answer: JsonObject) -> Loaded:
    """The answer as a finding; VerificationFailed where it is a wrong one."""
    name = f"transformers {_version('transformers')}"
    step, code = answer["step"], answer["code"]
    problem = answer.get("problem") or (answer["last"] if code else "")
    if step in ("start", "plain"):
        return Loaded(loader, why=f"{name} does not run the cut model: {problem or code}")
    if code == _KILLED:
        return Loaded(loader, why=f"{name} was killed: there was not enough memory")
    if problem or step != "done":
        raise _failed(source, f"{name} does not load it", f"{step}: {problem or code}")
    if not answer["worst"] <= SAME:
        raise _failed(
            source,
            f"{name} loads other weights than were written",
            f"relative difference {answer['worst']:.3g}",
            tensor=answer["where"],
            expected=f"at most {SAME:.2g}, of {answer['parameters']} parameters",
        )
    if not answer["logits"] <= LOGITS:
        expected = f"at most {LOGITS:g}"
        found = f"relative difference {answer['logits']:.3g}"
        raise _failed(source, f"{name} computes other logits", found, expected=expected)
    return Loaded(loader, name, answer["parameters"], cut.layers, answer["logits"])


def _failed(source: Checkpoint, what: str, found: str, **where: str) -> VerificationFailed:
    return VerificationFailed(
        what,
        file=source.folder,
        found=found,
        **where,
        hint="choose another --format or --for; --no-loader-check leaves this check out",
    )
