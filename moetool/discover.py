"""Find the classes in the files of a folder: what is added is a new file, and shows up by itself."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

from moetool.errors import MoetoolError

Kind = TypeVar("Kind")


def classes(package: ModuleType, base: type[Kind]) -> dict[str, type[Kind]]:
    """name -> class, for every subclass of `base` with a `name` in the package's files, in name
    order. A file that does not import is an error, and so are two classes of one name.
    """
    found: dict[str, type[Kind]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for thing in vars(module).values():
            if (
                isinstance(thing, type)
                and issubclass(thing, base)
                and thing.__module__ == module.__name__
                and (name := getattr(thing, "name", ""))
            ):
                if name in found:
                    raise MoetoolError(
                        f"two classes are called {name!r}",
                        found=f"{found[name].__module__}, {thing.__module__}",
                        hint="give one of them another name",
                    )
                found[name] = thing
    return dict(sorted(found.items()))
