"""Put the groups of a config into a stock model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moetool.data import JsonObject
from moetool.modeling import sites
from moetool.modeling.sites.site import has
from moetool.surgery import towers
from moetool.surgery.groups import Group
from moetool.surgery.layout import Layout


def install(
    model: nn.Module, groups: Sequence[Group], base: str, config: JsonObject | None = None
) -> None:
    """Make modules with experts of modules of `model`, a stock model of family `base` with this
    config: which, the site and the tower of each group say. A class that lacks one of several
    towers lacks its groups too.

    MoetoolError where the family has no such module, a group names a layer that is not there, or a
    site, form, law or key is unknown or does not go with the group's base.
    """
    layout = Layout.load(base)
    every = dict.fromkeys(group.tower for group in groups)
    at = {name: towers.layout_of(layout, name, config or {}) for name in every}
    there = [name for name in at if has(model, at[name])] or every
    for site, tower in dict.fromkeys((g.site, g.tower) for g in groups if g.tower in there):
        here = [g for g in groups if (g.site, g.tower) == (site, tower)]
        sites.named(site).install(model, at[tower], here)
