"""What a route looks at to score experts: one file a key, found by itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache

from moetool import discover
from moetool.errors import MoetoolError, did_you_mean
from moetool.modeling.routes.scorer import Scorer


@lru_cache(maxsize=1)
def keys() -> Mapping[str, type[Scorer]]:
    """key -> what scores by it."""
    return discover.classes(sys.modules[__name__], Scorer)


def named(key: str) -> type[Scorer]:
    """MoetoolError with the nearest names where there is none."""
    if key not in keys():
        raise MoetoolError(
            f"no route has the key {key!r}",
            file="config.json",
            expected=", ".join(keys()),
            hint=did_you_mean(key, keys()),
        )
    return keys()[key]
