"""The model type `moetool` in transformers' registry, as soon as there is one.

`import moetool` must stay light, so nothing of transformers is imported here: the config class is
registered when somebody else imports the module with the registry (at once, where that is done).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

REGISTRY = "transformers.models.auto.configuration_auto"


def announce() -> None:
    """Register the model type now or when the registry is imported."""
    module = sys.modules.get(REGISTRY)
    if module is not None and hasattr(module, "AutoConfig"):
        register(module)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def register(registry: ModuleType) -> None:
    """Say in transformers' registry which config class reads the model type."""
    from moetool.modeling.carrier import MoetoolConfig

    registry.AutoConfig.register(MoetoolConfig.model_type, MoetoolConfig, exist_ok=True)


class _Waiting:
    """Finds the registry as everybody does, and registers when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and found.loader is not None:
            loader: Any = found.loader
            loader.exec_module = _followed(loader.exec_module)
        return found


def _followed(run: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        run(module)
        register(module)

    return exec_module
