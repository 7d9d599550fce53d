"""What every site answers to those who run models, and how its modules are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from moetool.errors import MoetoolError
from moetool.modeling import experts, laws, routes
from moetool.modeling.block import Deep, FfnLinears, Grouped, grown
from moetool.modeling.routes.scorer import Scorer
from moetool.surgery import places
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import BASES, Group
from moetool.surgery.layout import Layout

_RESTORE = "restore the config.json that came with the model"


class GroupSite:
    """Subclass it in a file of this folder, with the `name` of a site of surgery/places, and say
    what its modules become (`kind`).
    """

    name: ClassVar[str] = ""
    kind: ClassVar[type[Grouped]]
    forms: ClassVar[tuple[str, ...]] = ()  # that can stand there; all, where none is said
    bases: ClassVar[tuple[str, ...]] = BASES

    def install(self, model: nn.Module, layout: Layout, groups: Sequence[Group]) -> None:
        """Put groups of this site into a stock model. MoetoolError where the family has no such
        site, or a group names a layer that is not there.
        """
        place, layers = places.named(self.name), self.layers(model, layout)
        together = dict[str, list[Scorer]]()
        for number in sorted(set().union(*(group.layers for group in groups))):
            if number >= len(layers):
                raise wrong(
                    "a group of experts in a layer that is not there",
                    f"layers 0 to {len(layers) - 1}",
                    str(number),
                )
            here = [group for group in groups if number in group.layers]
            found: dict[str, tuple[FfnBlock, list[Group]]] = {}
            for group in here:
                for block in place.of(layout, group):
                    found.setdefault(block.within, (block, []))[1].append(group)
            for name, (block, mine) in found.items():
                module = layers[number].get_submodule(name)
                self.grow(module, block, mine)
                for group in (one for one in mine if one.once):
                    together.setdefault(group.name, []).append(getattr(module, group.router))
                    together[group.name][-1].stands(len(together[group.name]) - 1)
        for first, *others in together.values():
            first.among(1 + len(others))

    def layers(self, model: nn.Module, layout: Layout) -> nn.ModuleList:
        """The modules that its blocks are in."""
        return stack(model, layout)

    def kind_of(self, block: FfnBlock) -> type[Grouped]:
        """What a module becomes."""
        return self.kind

    def grow(self, module: nn.Module, block: FfnBlock, groups: Sequence[Group]) -> None:
        """Make of a stock module one with these groups: its class becomes `kind`, routers and
        experts are added, and what these replace goes.
        """
        many = len(groups) > 1 and places.named(self.name).alone
        if many or isinstance(module, Grouped):
            raise wrong(f"two groups in one module, {block.module}", "one", "two")
        linears = self.linears(module, block)
        module.__class__ = grown(self.kind_of(block), type(module))
        assert isinstance(module, Grouped)
        module.linears = linears
        module.held = tuple((group, laws.named(group.route.law)(group.route)) for group in groups)
        paths = {linear.name: linear.path for linear in block.linears}
        if isinstance(module, Deep):
            module.paths = paths
        for group in groups:
            self.check(module, group)
            module.add_module(group.router, routes.named(group.route.key)(group, linears.hidden))
            module.add_module(group.name, self.experts(group, linears))
        for group in groups:
            for name in filter(group.has, linears.names) if group.base == "gone" else ():
                head, _, last = paths[name].rpartition(".")
                delattr(module.get_submodule(head), last)

    def linears(self, module: nn.Module, block: FfnBlock) -> FfnLinears:
        """What a module's own linears are called, and their shapes."""
        return linears_of(module, block)

    def experts(self, group: Group, linears: FfnLinears) -> nn.Module:
        """The experts of a group, built."""
        return experts.named(group)(group, linears)

    def check(self, module: Grouped, group: Group) -> None:
        """Refuse a group that cannot stand there."""
        if taken := next((n for n in (group.router, group.name) if hasattr(module, n)), None):
            raise wrong(
                f"a group called {group.name!r}, where the {self.name} has a {taken!r} of its own",
                "another name",
                group.name,
            )
        if self.forms and group.form not in self.forms:
            raise wrong(
                f"{group.form} experts at the site {self.name}", ", ".join(self.forms), group.form
            )
        alone = {
            f"a route by {group.route.key}": routes.named(group.route.key).sites,
            f"{group.form} experts": experts.sites_of(group.form),
        }
        for what, where in alone.items():
            if where and self.name not in where:
                raise wrong(what, f"site {' or '.join(where)}", self.name)
        if group.base not in self.bases:
            raise wrong(
                f"base {group.base!r} at the site {self.name}", ", ".join(self.bases), group.base
            )


def wrong(what: str, expected: str, found: str) -> MoetoolError:
    """What to say of a group that a config has wrongly."""
    return MoetoolError(what, file="config.json", expected=expected, found=found, hint=_RESTORE)


def has(model: nn.Module, layout: Layout) -> bool:
    """Whether a class of the family has the layout's stack of layers: not every one has every tower."""
    end = ".".join((layout.stack or "").split(".")[-3:])
    names = (name for name, _ in model.named_modules())
    return _find(model, layout) is not None or any(n == end or n.endswith(f".{end}") for n in names)


def _find(model: nn.Module, layout: Layout) -> nn.ModuleList | None:
    """The stack of layers, under a head or without one."""
    said = layout.stack or ""
    for name in _paths(model, layout):
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue
        if name and isinstance(found, nn.ModuleList):
            return found
        if name and any(tower.stack == said and tower.single for tower in layout.towers):
            return nn.ModuleList([found])
    return None


def _paths(model: nn.Module, layout: Layout) -> tuple[str, ...]:
    """Where the stack of layers may be."""
    said, head = layout.stack or "", getattr(model, "base_model_prefix", "")
    inner = said.partition(".")[2]
    return said, inner, f"{head}.{inner}"


def parent(model: nn.Module, layout: Layout) -> nn.Module:
    """The module that holds the stack of layers; MoetoolError where it is not there."""
    layers = stack(model, layout)
    return next(m for m in model.modules() if any(one is layers for one in m.children()))


def stack(model: nn.Module, layout: Layout) -> nn.ModuleList:
    """The stack of layers; MoetoolError where it is not there."""
    if (found := _find(model, layout)) is not None:
        return found
    raise MoetoolError(
        f"{layout.model_type} has no place for groups of experts",
        expected="a plain stack of layers",
        found=layout.stack or "none",
        hint=f"`moetool archs show {layout.model_type}` shows what is known of it",
    )


def linears_of(module: nn.Module, block: FfnBlock) -> FfnLinears:
    """What a module's own linears are called, and their shapes."""
    out = block.last.name
    into = tuple(one.name for one in block.linears if one.name != out)
    paths = {one.name: one.path for one in block.linears}
    found = {name: module.get_submodule(paths[name]) for name in (*into, out)}
    transposed = not isinstance(found[out], nn.Linear)  # Conv1D
    shapes = {}
    for name, linear in found.items():
        one, other = linear.get_parameter("weight").shape
        shapes[name] = (other, one) if transposed else (one, other)
    biased = {name for name, linear in found.items() if getattr(linear, "bias", None) is not None}
    return FfnLinears(into, out, shapes, frozenset(biased), transposed)
