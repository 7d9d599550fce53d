"""Lower the temperature of routes that are dense while they learn."""

from __future__ import annotations

from itertools import chain
from typing import Any

from moetool.errors import MoetoolError
from moetool.modeling.block import blocks
from moetool.modeling.laws.gumbel import GumbelLaw


def anneal(model: Any, temperature: float) -> int:
    """Set the temperature of every Gumbel law of a model, in its config too; how many there are.
    EvoMoE (arXiv 2112.14397) lowers it exponentially from step to step. MoetoolError unless it is
    above 0.
    """
    if not temperature > 0:
        raise MoetoolError(
            "a temperature of nothing",
            expected="a number above 0",
            found=temperature,
            hint="for example from 1 to 0.3",
        )
    laws = chain.from_iterable((law for _, law in block.held) for block in blocks(model))
    held = [law for law in laws if isinstance(law, GumbelLaw)]
    for law in held:
        law.temperature = temperature
    for group in model.config.moetool["groups"]:
        route = group.get("route", {})
        if route.get("law") == GumbelLaw.name:
            route["options"]["temperature"] = temperature
    return len(held)
