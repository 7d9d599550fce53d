"""The file formats that an output can have: one file each, found by itself."""

from __future__ import annotations

import sys
from functools import lru_cache

from moetool import discover
from moetool.data import JsonObject
from moetool.surgery.containers.container import Container, Shard, Whole

__all__ = ["Container", "Shard", "Whole", "named", "of"]
USUAL = "safetensors"


@lru_cache(maxsize=1)
def _all() -> dict[str, Container]:
    return {n: kind() for n, kind in discover.classes(sys.modules[__name__], Container).items()}


def named(name: str) -> Container:
    """The container of this name; KeyError where there is none."""
    return _all()[name]


def of(said: JsonObject) -> Container:
    """The container of an output, from what its plan says of it: {} is safetensors."""
    return named(str(said.get("name", USUAL)))
