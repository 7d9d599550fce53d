"""What a published merging method is: a choice for each of the parts, under its name. One file in this folder each."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import ClassVar

from moetool.errors import UsageError, did_you_mean


class Preset:
    """Subclass it in a file of this folder: `name`, whether it needs `text`, and `choices` for the options that were left on auto."""

    name: ClassVar[str] = ""
    text: ClassVar[bool] = True
    choices: ClassVar[dict[str, str]] = {}


@lru_cache(maxsize=1)
def presets() -> dict[str, type[Preset]]:
    """Every merging method, by name; a file that does not import is an error."""
    import moetool.methods.merge as package

    found: dict[str, type[Preset]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for thing in vars(module).values():
            if isinstance(thing, type) and issubclass(thing, Preset) and thing.name and thing.__module__ == module.__name__:
                found[thing.name] = thing
    return dict(sorted(found.items()))


def get(name: str) -> type[Preset]:
    """The merging method of this name; UsageError with the nearest names."""
    if name not in presets():
        raise UsageError(f"no merging method {name!r}", hint=did_you_mean(name, [*presets(), "auto"]))
    return presets()[name]
