"""What a route looks at to score experts: one file a key, found by itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache

from moetool import discover
from moetool.modeling.routes.scorer import Scorer
from moetool.surgery import strict


@lru_cache(maxsize=1)
def keys() -> Mapping[str, type[Scorer]]:
    """key -> what scores by it."""
    return discover.classes(sys.modules[__name__], Scorer)


def named(key: str) -> type[Scorer]:
    """MoetoolError with the nearest names where there is none."""
    strict.word(key, tuple(keys()), "route has the key")
    return keys()[key]
