"""How scores become experts and weights: one file a law, found by itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache

from moetool import discover
from moetool.modeling.laws.law import CombineLaw
from moetool.surgery import strict


@lru_cache(maxsize=1)
def laws() -> Mapping[str, type[CombineLaw]]:
    """name -> law."""
    return discover.classes(sys.modules[__name__], CombineLaw)


def named(law: str) -> type[CombineLaw]:
    """MoetoolError with the nearest names where there is none."""
    strict.word(law, tuple(laws()), "route has the law")
    return laws()[law]
