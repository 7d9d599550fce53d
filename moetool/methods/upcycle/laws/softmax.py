"""The shares of the chosen among all."""

from __future__ import annotations

from moetool.methods.contract import Certificate
from moetool.methods.upcycle.laws.law import RouteLaw, exact
from moetool.surgery.groups import Group


class SoftmaxWord(RouteLaw):
    """The chosen keep their shares among all: Switch, MoTE."""

    name = "softmax"

    def certificate(self, group: Group) -> Certificate:
        rows = group.route.options.get("allowed") or [[1] * group.choices]
        if all(sum(row) == group.route.top_k for row in rows):
            return exact(group, "all of them run")
        return super().certificate(group)
