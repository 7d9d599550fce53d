"""What a published merging method is: a choice for each of the parts, under its name. One file in
this folder each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

from moetool.methods import discover


class Preset:
    """Subclass it in a file of this folder: `name`, whether it needs `text`, and `choices` for the
    options that were left on auto.
    """

    name: ClassVar[str] = ""
    text: ClassVar[bool] = True
    choices: ClassVar[dict[str, str]] = {}


@lru_cache(maxsize=1)
def presets() -> dict[str, type[Preset]]:
    """Every merging method, by name."""
    import moetool.methods.merge as package

    return discover.classes(package, Preset)


def get(name: str) -> type[Preset]:
    """The merging method of this name; UsageError with the nearest names."""
    return discover.named(name, presets(), "merging")
