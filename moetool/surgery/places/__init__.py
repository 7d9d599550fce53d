"""Where in a family's model groups of experts stand: one file a site, found by itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache

from moetool import discover
from moetool.surgery import strict
from moetool.surgery.places.place import GroupPlace


@lru_cache(maxsize=1)
def known() -> Mapping[str, type[GroupPlace]]:
    """site -> where it is."""
    return discover.classes(sys.modules[__name__], GroupPlace)


def named(site: str) -> GroupPlace:
    """MoetoolError with the nearest names where there is none."""
    strict.word(site, tuple(known()), "groups of experts stand at the site")
    return known()[site]()
