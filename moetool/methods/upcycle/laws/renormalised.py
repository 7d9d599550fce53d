"""The shares of the chosen, divided by their sum."""

from __future__ import annotations

from moetool.methods.upcycle.laws.law import RouteLaw


class RenormalisedWord(RouteLaw):
    """The shares of the chosen are divided by their sum: Mixtral, MixLoRA."""

    name = "renormalised"
    sums = True
