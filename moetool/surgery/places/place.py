"""What every site answers to those who read names alone; modeling/sites says how it runs."""

from __future__ import annotations

from typing import ClassVar

from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import Group
from moetool.surgery.layout import Layout


class GroupPlace:
    """Subclass it in a file of this folder, with a `name`; its docstring describes it. Nothing
    heavy is imported here: `--help` reads all sites.
    """

    name: ClassVar[str] = ""
    noun: ClassVar[str] = ""  # what stands there
    alone: ClassVar[bool] = True  # whether a module of it can have one group at most
    outside: ClassVar[bool] = False  # whether it is beside the stack of layers; it is in layer 0

    @classmethod
    def about(cls) -> str:
        """Its docstring on one line."""
        return " ".join((cls.__doc__ or "").split())

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        """The modules of a layer that get experts, with the linears that these stand for.
        MoetoolError where the family has none.
        """
        raise NotImplementedError

    def of(self, layout: Layout, group: Group) -> tuple[FfnBlock, ...]:
        """Those that a group is in."""
        return self.blocks(layout)
