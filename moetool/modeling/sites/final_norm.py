"""The norm behind the last layer: as those of the layers."""

from __future__ import annotations

from torch import nn

from moetool.modeling.sites.norms import NormsSite
from moetool.modeling.sites.site import parent
from moetool.surgery.layout import Layout


class FinalNormSite(NormsSite):
    """One group of weights."""

    name = "final_norm"

    def layers(self, model: nn.Module, layout: Layout) -> nn.ModuleList:
        return nn.ModuleList([parent(model, layout)])
