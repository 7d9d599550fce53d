"""Put the groups of a config into a stock model: blocks are found by the family's layout."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moetool.errors import MoetoolError
from moetool.modeling import experts, laws, routes
from moetool.modeling.block import FfnLinears, GroupedBlock, grown
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import Group
from moetool.surgery.layout import Layout


def install(model: nn.Module, groups: Sequence[Group], base: str) -> None:
    """Make blocks with experts of the FFNs of `model`, a stock model of family `base`.

    MoetoolError where the family's data names no FFN in one module, a group names a layer that is
    not there, or a form, law or key is unknown or does not go with the group's base.
    """
    layout = Layout.load(base)
    ffn, layers = FfnBlock.of(layout), _layers(model, layout)
    inside = ffn.module.partition("{layer}.")[2]
    for number in sorted(set().union(*(group.layers for group in groups))):
        if number >= len(layers):
            raise MoetoolError(
                "a group of experts in a layer that is not there",
                file="config.json",
                expected=f"layers 0 to {len(layers) - 1}",
                found=number,
                hint="restore the config.json that came with the model",
            )
        here = [group for group in groups if number in group.layers]
        _grow(layers[number].get_submodule(inside), ffn, here)


def _layers(model: nn.Module, layout: Layout) -> nn.ModuleList:
    """The stack of layers, under a head or without one."""
    stack, head = layout.stack or "", getattr(model, "base_model_prefix", "")
    inner = stack.partition(".")[2]
    for name in (stack, inner, f"{head}.{inner}"):
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue
        if name and isinstance(found, nn.ModuleList):
            return found
    raise _homeless(layout, "a plain stack of layers", stack or "none")


def _grow(block: nn.Module, ffn: FfnBlock, groups: Sequence[Group]) -> None:
    """Make a block with these groups of a stock FFN."""
    linears = _linears(block, ffn)
    block.__class__ = grown(type(block))
    assert isinstance(block, GroupedBlock)
    block.linears = linears
    block.held = tuple((group, laws.named(group.route.law)(group.route)) for group in groups)
    for group in groups:
        if taken := next((n for n in (group.router, group.name) if hasattr(block, n)), None):
            raise MoetoolError(
                f"a group called {group.name!r}, where the FFN has a {taken!r} of its own",
                file="config.json",
                hint="restore the config.json that came with the model",
            )
        block.add_module(group.router, routes.named(group.route.key)(group, linears.hidden))
        block.add_module(group.name, experts.named(group)(group, linears))
    if all(group.base == "gone" for group in groups):
        for name in linears.names:
            delattr(block, name)


def _linears(block: nn.Module, ffn: FfnBlock) -> FfnLinears:
    """What a block's own linears are called, and their shapes."""
    out = ffn.last.name
    into = tuple(one.name for one in ffn.linears if one.name != out)
    found = {name: block.get_submodule(name) for name in (*into, out)}
    transposed = not isinstance(found[out], nn.Linear)  # Conv1D
    shapes = {}
    for name, linear in found.items():
        one, other = linear.get_parameter("weight").shape
        shapes[name] = (other, one) if transposed else (one, other)
    biased = {name for name, linear in found.items() if getattr(linear, "bias", None) is not None}
    return FfnLinears(into, out, shapes, frozenset(biased), transposed)


def _homeless(layout: Layout, expected: str, found: str) -> MoetoolError:
    return MoetoolError(
        f"{layout.model_type} has no place for groups of experts",
        expected=expected,
        found=found,
        hint=f"`moetool archs show {layout.model_type}` shows what is known of it",
    )
