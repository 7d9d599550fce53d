"""Merged experts in a plan: one task each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moetool.data import JsonObject
from moetool.methods.contract import Builder
from moetool.methods.reduce.decided import order_key
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.writing import Cluster, Writing
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import Piece


class Merger:
    """Plans the experts that are made from several."""

    def __init__(self, how: JsonObject, writing: Writing) -> None:
        self.tables, self.extra = writing.tables, writing.extra
        self.whitened = bool(how.get("whiten"))
        self.how = {k: v for k, v in how.items() if k != "whiten"}

    def makes(self, decision: Decision, members: tuple[int, ...]) -> bool:
        return len(members) > 1

    def make(self, build: Builder, cluster: Cluster, outs: Mapping[str, Piece]) -> None:
        for role, out in outs.items():
            if role in cluster.solved:
                build.copy(cluster.solved[role], out)
        every = list(cluster.pieces[0])
        roles = [r for r in every if r in outs and r not in cluster.solved]
        inputs: list[Piece] = []
        for pieces in cluster.pieces:
            inputs += [pieces[r] for r in every]
        orders = [None, *(order_key(cluster.layer, e) for e in cluster.members[1:])]
        if self.whitened:
            inputs += covariances(self.extra, cluster.layer, cluster.members)
        build.task(
            "merge",
            inputs,
            [outs[r] for r in roles],
            members=len(cluster.members),
            weights=list(cluster.weights),
            roles=",".join(every),
            made=",".join(roles),
            form=cluster.form,
            align=orders if any(k in self.tables for k in orders if k) else None,
            **self.how,
        )


def covariances(extra: Sequence[Checkpoint], layer: int, members: Sequence[int]) -> list[Piece]:
    """Second moments of inputs, among the sources beside the model: of gate and up (the layer's),
    then of each member's down.
    """
    names = (f"{layer}.in_cov", f"{layer}.mid_cov")
    number = next((n for n, c in enumerate(extra, 1) if names[0] in c.tensors), 1)
    seen, between = (extra[number - 1].tensor(name) for name in names)
    size = between.shape[1] * between.shape[2]
    return [
        Piece(seen.name, seen.shape, 0, number),
        *(Piece(between.name, between.shape[1:], e * size, number) for e in members),
    ]
