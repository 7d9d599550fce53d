"""Put the groups of a config into a stock model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moetool.modeling import sites
from moetool.surgery.groups import Group
from moetool.surgery.layout import Layout


def install(model: nn.Module, groups: Sequence[Group], base: str) -> None:
    """Make modules with experts of modules of `model`, a stock model of family `base`: which, the
    site of each group says.

    MoetoolError where the family has no such module, a group names a layer that is not there, or a
    site, form, law or key is unknown or does not go with the group's base.
    """
    layout = Layout.load(base)
    for site in dict.fromkeys(group.site for group in groups):
        sites.named(site).install(model, layout, [g for g in groups if g.site == site])
