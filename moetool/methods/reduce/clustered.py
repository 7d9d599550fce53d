"""One expert of each cluster stays: what all such ways do with the groups of a router, and with
experts that stay whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable

from moetool.methods.reduce.view import View

Pick = Callable[[list[int], int], list[int]]


def keep(view: View, count: int, pick: Pick) -> list[int]:
    """The `count` experts that stay: protected ones, and of each router group those that
    `pick(free, room)` chooses, one a cluster.
    """
    kept: list[int] = []
    for members in view.groups():
        mine = [e for e in members if e in view.protected]
        free = [e for e in members if e not in view.protected]
        room = view.share(count) - len(mine)
        kept += [*mine, *(pick(free, room) if room > 0 else [])]
    return sorted(kept)


def gathered(free: list[int], labels: list[int]) -> list[list[int]]:
    """The members of each cluster, clusters by label."""
    return [
        [e for e, own in zip(free, labels, strict=True) if own == label]
        for label in sorted(set(labels))
    ]
