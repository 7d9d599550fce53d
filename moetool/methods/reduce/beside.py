"""Loose safetensors files as sources of a plan: statistics of a profile, tensors that deciding
solved for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.headers import read_header
from moetool.surgery.spec import Stored


def solved_name(layer: int, expert: int, role: str) -> str:
    """Name of a tensor that deciding computed for a new expert."""
    return f"{layer}.{expert}.{role}"


def solved(extra: Sequence[Checkpoint]) -> bool:
    """Whether down matrices of new experts lie among these sources."""
    return any(name.endswith(".down") for name in chain.from_iterable(one.tensors for one in extra))


def stats_source(folder: str | Path) -> Checkpoint:
    """A profile's layer files as a source of tensors (`LAYER.name`)."""
    return _source(Path(folder), "layer-*.safetensors")


def solved_source(folder: str | Path) -> Checkpoint:
    """What was solved, layer by layer."""
    return _source(Path(folder), "solved-*.safetensors")


def _source(folder: Path, pattern: str) -> Checkpoint:
    tensors: dict[str, Stored] = {}
    files: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.glob(pattern)):
        stored, seal, size, _ = read_header(path)
        files[path.name] = (size, seal)
        tensors |= {t.name: t for t in stored}
    return Checkpoint(str(folder), {}, tensors, files)
