"""What every site answers to those who run models, and how its modules are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from moetool.errors import MoetoolError
from moetool.modeling import experts, laws, routes
from moetool.modeling.block import FfnLinears, Grouped, grown
from moetool.surgery import places
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import Group
from moetool.surgery.layout import Layout

_RESTORE = "restore the config.json that came with the model"


class GroupSite:
    """Subclass it in a file of this folder, with the `name` of a site of surgery/places, and say
    what its modules become (`kind`).
    """

    name: ClassVar[str] = ""
    kind: ClassVar[type[Grouped]]

    def install(self, model: nn.Module, layout: Layout, groups: Sequence[Group]) -> None:
        """Put groups of this site into a stock model. MoetoolError where the family has no such
        site, or a group names a layer that is not there.
        """
        blocks, layers = places.named(self.name).blocks(layout), stack(model, layout)
        for number in sorted(set().union(*(group.layers for group in groups))):
            if number >= len(layers):
                raise MoetoolError(
                    "a group of experts in a layer that is not there",
                    file="config.json",
                    expected=f"layers 0 to {len(layers) - 1}",
                    found=number,
                    hint=_RESTORE,
                )
            here = [group for group in groups if number in group.layers]
            for block in blocks:
                inside = block.module.partition("{layer}.")[2]
                self.grow(layers[number].get_submodule(inside), block, here)

    def grow(self, module: nn.Module, block: FfnBlock, groups: Sequence[Group]) -> None:
        """Make of a stock module one with these groups: its class becomes `kind`, routers and
        experts are added, and what these replace goes.
        """
        linears = linears_of(module, block)
        module.__class__ = grown(self.kind, type(module))
        assert isinstance(module, Grouped)
        module.linears = linears
        module.held = tuple((group, laws.named(group.route.law)(group.route)) for group in groups)
        for group in groups:
            if taken := next((n for n in (group.router, group.name) if hasattr(module, n)), None):
                raise MoetoolError(
                    f"a group called {group.name!r}, where the {self.name} has a {taken!r} of its "
                    "own",
                    file="config.json",
                    hint=_RESTORE,
                )
            module.add_module(group.router, routes.named(group.route.key)(group, linears.hidden))
            module.add_module(group.name, experts.named(group)(group, linears))
        if all(group.base == "gone" for group in groups):
            for name in linears.names:
                delattr(module, name)


def stack(model: nn.Module, layout: Layout) -> nn.ModuleList:
    """The stack of layers, under a head or without one."""
    said, head = layout.stack or "", getattr(model, "base_model_prefix", "")
    inner = said.partition(".")[2]
    for name in (said, inner, f"{head}.{inner}"):
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue
        if name and isinstance(found, nn.ModuleList):
            return found
    raise MoetoolError(
        f"{layout.model_type} has no place for groups of experts",
        expected="a plain stack of layers",
        found=said or "none",
        hint=f"`moetool archs show {layout.model_type}` shows what is known of it",
    )


def linears_of(module: nn.Module, block: FfnBlock) -> FfnLinears:
    """What a module's own linears are called, and their shapes."""
    out = block.last.name
    into = tuple(one.name for one in block.linears if one.name != out)
    found = {name: module.get_submodule(name) for name in (*into, out)}
    transposed = not isinstance(found[out], nn.Linear)  # Conv1D
    shapes = {}
    for name, linear in found.items():
        one, other = linear.get_parameter("weight").shape
        shapes[name] = (other, one) if transposed else (one, other)
    biased = {name for name, linear in found.items() if getattr(linear, "bias", None) is not None}
    return FfnLinears(into, out, shapes, frozenset(biased), transposed)
