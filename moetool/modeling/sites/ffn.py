"""The FFN of a layer."""

from __future__ import annotations

from moetool.modeling.block import GroupedBlock
from moetool.modeling.sites.site import GroupSite


class FfnSite(GroupSite):
    """Experts are FFNs in the place of it, under it or beside it."""

    name = "ffn"
    kind = GroupedBlock
