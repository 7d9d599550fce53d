"""All experts, each with its share."""

from __future__ import annotations

from moetool.methods.upcycle.laws.law import RouteLaw


class SoftWord(RouteLaw):
    """All experts run for every token, each with its share of the softmax."""

    name = "soft"
    sums = True
    all_run = True
