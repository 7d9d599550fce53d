"""The queries of attention heads."""

from __future__ import annotations

from moetool.methods.upcycle.keys.key import RouteKey


class QueryKey(RouteKey):
    """How long the query of each head is, with --site heads: no router, nothing new to learn."""

    name = "query"
    draws = False
    sites = ("heads",)
