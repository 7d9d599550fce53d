"""Experts that are parts of what is there already: they have no tensors of their own."""

from __future__ import annotations

from typing import ClassVar

from moetool.modeling.block import FfnLinears
from moetool.modeling.experts.group import Expert, ExpertGroup
from moetool.surgery.groups import PART, Group
from moetool.surgery.strict import Kinds


class PartExperts(ExpertGroup):
    """params: shared, how many of the parts always work; they come first."""

    name: ClassVar[str] = PART
    bases: ClassVar[tuple[str, ...]] = ("under",)
    sites: ClassVar[tuple[str, ...]] = ("heads",)
    knows: ClassVar[Kinds] = {"shared": int}

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        return Expert((), {})
