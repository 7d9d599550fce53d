"""How scores become experts and weights: one file a law, found by itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache

from moetool import discover
from moetool.errors import MoetoolError, did_you_mean
from moetool.modeling.laws.law import CombineLaw


@lru_cache(maxsize=1)
def laws() -> Mapping[str, type[CombineLaw]]:
    """name -> law."""
    return discover.classes(sys.modules[__name__], CombineLaw)


def named(law: str) -> type[CombineLaw]:
    """MoetoolError with the nearest names where there is none."""
    if law not in laws():
        raise MoetoolError(
            f"no route has the law {law!r}",
            file="config.json",
            expected=", ".join(laws()),
            hint=did_you_mean(law, laws()),
        )
    return laws()[law]
