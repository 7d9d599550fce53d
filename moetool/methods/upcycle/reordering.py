"""The neurons of an FFN: whether parts of them add up to it, and another order of them, in its own
tensors.
"""

from __future__ import annotations

from itertools import pairwise

from moetool.errors import UsageError
from moetool.methods.contract import Builder
from moetool.methods.upcycle import carve
from moetool.methods.upcycle.ground import Ground
from moetool.surgery.ffn import LAST, FfnLinear
from moetool.surgery.spec import Stored, rows

_SPARSE = "activation_sparsity_pattern"  # a cut by the mean and deviation of all neurons


def check(ground: Ground) -> None:
    """Refuse an FFN in which a neuron depends on others. UsageError"""
    said = ground.at.config.get(_SPARSE)
    found = [_SPARSE] if any(said if isinstance(said, list) else [said]) else []
    found += [] if ground.block.steps else _between(ground)
    if found:
        raise UsageError(
            "parts of this FFN do not add up to it",
            expected="neurons that do not look at each other",
            found=found[0],
            hint="other experts, for example --form full without --split",
        )


def _between(ground: Ground) -> list[str]:
    """A norm over all neurons."""
    layer, width = ground.layers[0], (ground.width,)
    inside = f"{ground.module(layer)}."
    biases = [ground.bias(linear, layer) for linear in ground.block.linears]
    known = [bias.name for bias in biases if bias is not None]
    held = ground.source.tensors.items()
    lone = (name for name, one in held if one.shape == width and name not in known)
    return [name for name in lone if ground.today(name).startswith(inside)]


def copied(build: Builder, ground: Ground, name: str) -> bool:
    """Plan a tensor of SRC with the neurons of its layer as that layer's table orders them; whether
    it is one that has any. A bias of what comes out has none.
    """
    layer = ground.at.layer_of(ground.today(name))
    if layer not in ground.layers:
        return False
    for linear in ground.block.linears:
        axis = int((linear.role in LAST) != linear.transposed)
        held = [(ground.stored(linear, layer), axis)]
        bias = ground.bias(linear, layer)
        held += [(bias, 0)] if bias is not None and linear.role not in LAST else []
        for stored, along in held:
            if stored.name == name:
                _copy(build, linear, stored, ground.today(name), (along, carve.order_name(layer)))
                return True
    return False


def _copy(
    build: Builder, linear: FfnLinear, stored: Stored, name: str, order: tuple[int, str]
) -> None:
    """Gate above up is two matrices. `order`: where neurons lie, and the table of them."""
    target = build.target(name, stored.dtype, stored.shape)
    height, axis = stored.shape[0], order[0]
    runs = 2 if linear.role == "gate_up" else 1
    for first, last in pairwise(height * n // runs for n in range(runs + 1)):
        build.task(
            "neurons",
            [rows(stored, first, last)],
            [rows(target, first, last)],
            axis=axis,
            order=order[1],
        )
