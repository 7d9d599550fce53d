"""The state-space mixer of a layer: experts are its projections, whole, and each token has its own;
convolution and scan are one for all, and so is the cache (Mixture-of-Mamba, arXiv 2501.16295).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from moetool.modeling.block import FfnLinears, Swapped
from moetool.modeling.sites.projections import GroupedProjections, ProjectionExperts
from moetool.modeling.sites.site import GroupSite
from moetool.surgery.groups import Group


class GroupedMixer(GroupedProjections):
    """A mixer with one group of experts."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, with projections of each token's experts; not by kernels that take
        the weights of the whole layer at once, as stock classes do for training.
        """
        group, law = self.held[0]
        picked = self.picked(group, law, hidden_states.reshape(-1, hidden_states.shape[-1]))
        made = {n: _Projection(partial(self.mixed, n, picked)) for n in self.linears.names}
        swapped = Swapped(self, {**made, "training": False})
        return self.stock.forward(swapped, hidden_states, *args, **kwargs)


class _Projection:
    """A linear as a mixer uses it: called with x [..., length, in], or as a `weight` times x [...,
    in, length], with the bias in what it gives.
    """

    bias = None

    def __init__(self, mixed: Any) -> None:
        self.mixed = mixed

    @property
    def weight(self) -> _Projection:
        return self

    def __call__(self, x: Tensor) -> Tensor:
        made: Tensor = self.mixed(x)
        return made

    def __matmul__(self, x: Tensor) -> Tensor:
        return self(x.transpose(-1, -2)).transpose(-1, -2)


class MixerSite(GroupSite):
    """One group of whole projections."""

    name = "mixer"
    kind = GroupedMixer
    forms = ("full",)
    bases = ("member",)

    def experts(self, group: Group, linears: FfnLinears) -> nn.Module:
        return ProjectionExperts(group, linears)
