"""Put the groups of a config into a stock model: blocks are found by the family's layout."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moetool.errors import MoetoolError
from moetool.modeling import experts, laws, routes
from moetool.modeling.block import FfnLinears, GroupedBlock, grown
from moetool.surgery.groups import Group, linear_of
from moetool.surgery.layout import Layout

_INTO = ("gate", "up", "gate_up", "fc1")
_OUT = ("down", "fc2")


def install(model: nn.Module, groups: Sequence[Group], base: str) -> None:
    """Make blocks with experts of the FFNs of `model`, a stock model of family `base`.

    MoetoolError where the family's data names no FFN in one module, a group names a layer that is
    not there, or a form, law or key is unknown or does not go with the group's base.
    """
    layout = Layout.load(base)
    layers = _layers(model, layout)
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
        _grow(_block(layers[number], layout), _roles(layout), here)


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


def _roles(layout: Layout) -> dict[str, str]:
    """Role -> name inside a layer: mlp.gate_proj.weight."""
    found = {}
    for role in (*_INTO, *_OUT):
        slot = layout.role(f"ffn.{role}")
        if slot is not None:
            found[role] = slot.name.partition("{layer}.")[2]
    if not found.keys() & set(_OUT) or len(found) < 2:
        raise _homeless(layout, "an FFN whose linears the layout names", str(sorted(found)))
    return found


def _block(layer: nn.Module, layout: Layout) -> nn.Module:
    """The module of a layer with all linears of its FFN."""
    names = {name.rpartition(".")[0].rpartition(".")[0] for name in _roles(layout).values()}
    if len(names) != 1 or "" in names:
        raise _homeless(layout, "one module with all linears of the FFN", ", ".join(sorted(names)))
    return layer.get_submodule(names.pop())


def _grow(block: nn.Module, roles: dict[str, str], groups: Sequence[Group]) -> None:
    """Make a block with these groups of a stock FFN."""
    linears = _linears(block, roles)
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


def _linears(block: nn.Module, roles: dict[str, str]) -> FfnLinears:
    """What a block's own linears are called, and their shapes."""
    names = {role: linear_of(name) for role, name in roles.items()}
    out = next(names[role] for role in _OUT if role in names)
    into = tuple(name for name in names.values() if name != out)
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
