"""Lower the temperature of routes that are dense while they learn, by hand or in a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from transformers import TrainerCallback

from moetool.errors import MoetoolError, UsageError
from moetool.modeling.block import blocks
from moetool.modeling.laws.gumbel import GumbelLaw
from moetool.surgery.groups import MODEL_TYPE

DECAYS = ("exponential", "linear")


def anneal(model: Any, temperature: float, hard: bool = False) -> int:
    """Set the temperature of every Gumbel law of a model, in its config too, so that it is saved;
    how many there are. `hard`: from here on training runs the best expert alone, too. MoetoolError
    unless the temperature is above 0.
    """
    if not temperature > 0:
        raise MoetoolError(
            "a temperature of nothing",
            expected="a number above 0",
            found=temperature,
            hint="for example from 1 to 0.3",
        )
    held = [*_laws(model)]
    for law in held:
        law.temperature, law.hard = temperature, hard
    for group in getattr(model.config, MODEL_TYPE, {}).get("groups", ()):
        route = group.get("route", {})
        if route.get("law") == GumbelLaw.name:
            rest = {n: v for n, v in route["options"].items() if n != "hard"}
            route["options"] = (
                rest | {"temperature": temperature} | ({"hard": True} if hard else {})
            )
    return len(held)


def _laws(model: Any) -> Iterator[GumbelLaw]:
    laws = chain.from_iterable((law for _, law in block.held) for block in blocks(model))
    return (law for law in laws if isinstance(law, GumbelLaw))


class Annealing(TrainerCallback):  # type: ignore[misc]
    """Give it to a Trainer (`callbacks=[Annealing(2.0, 0.3, steps=1000)]`): before each step the
    temperature of every Gumbel law is what the number of that step says, which a checkpoint of the
    Trainer holds; the model is saved with the temperature that it has.

    From `first` to `last` in so many `steps`, exponentially (first * (last / first) ** (step /
    steps)) or linearly; at step `hard_at` training too goes on with the best expert alone (EvoMoE,
    arXiv 2112.14397). UsageError for numbers that are none of a temperature.
    """

    def __init__(
        self,
        first: float,
        last: float,
        steps: int,
        decay: str = DECAYS[0],
        hard_at: int | None = None,
    ) -> None:
        if not (first > 0 and last > 0 and steps > 0) or decay not in DECAYS:
            raise UsageError(
                "no schedule of a temperature",
                expected=f"first and last above 0, steps above 0, {' or '.join(DECAYS)}",
                found=f"{first}, {last}, {steps}, {decay}",
                hint="for example Annealing(2.0, 0.3, steps=1000)",
            )
        self.first, self.last, self.steps = first, last, steps
        self.decay, self.hard_at = decay, hard_at

    def temperature(self, step: int) -> float:
        """Of a step, from 0."""
        done = min(step / self.steps, 1.0)
        if self.decay == DECAYS[0]:
            return float(self.first * (self.last / self.first) ** done)
        return self.first + (self.last - self.first) * done

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asked by the Trainer. UsageError for a model without such a law."""
        step, model = state.global_step, kwargs["model"]
        hard = self.hard_at is not None and step >= self.hard_at
        if not anneal(model, self.temperature(step), hard):
            raise UsageError(
                "no route of this model has a temperature",
                expected="a group of experts behind the law gumbel",
                found="none",
                hint="moetool upcycle --law gumbel, or leave out Annealing",
            )
