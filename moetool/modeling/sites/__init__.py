"""How groups of experts are put into a stock module and run there: one file a site, found by
itself. Where the module is, surgery/places says under the same name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache

from moetool import discover
from moetool.modeling.sites.site import GroupSite
from moetool.surgery import strict


@lru_cache(maxsize=1)
def sites() -> Mapping[str, type[GroupSite]]:
    """name -> how it runs."""
    return discover.classes(sys.modules[__name__], GroupSite)


def named(site: str) -> GroupSite:
    """MoetoolError with the nearest names where there is none."""
    strict.word(site, tuple(sites()), "experts run at the site")
    return sites()[site]()
