"""From points to clusters, and who leads each."""

from __future__ import annotations

from itertools import chain, combinations
from typing import NamedTuple

import numpy as np

from moetool.kernels import cluster
from moetool.methods.merge.parts import features, twins
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.view import View

BIG = 16  # REAM's largest group


def decide(view: View, count: int, *, kind: str, points: np.ndarray, weigh: str) -> Decision:
    """Clusters of a layer: `count` in all, as many in each router group; protected experts stay
    alone, and equal ones come together before any others, whatever `kind` is.
    """
    need = saliency(view, weigh)
    groups: list[list[int]] = []
    for members in view.groups():
        alone = [e for e in members if e in view.protected]
        free = [e for e in members if e not in view.protected]
        room = view.share(count) - len(alone)
        groups += [[e] for e in alone]
        if free and room > 0:
            groups += _with_twins(free, room, kind, points, need, view)
    return finished(view, groups, points, need, lead_by_need=kind in ("dominant", "ream"))


def finished(
    view: View, groups: list[list[int]], points: np.ndarray, need: np.ndarray, *, lead_by_need: bool
) -> Decision:
    """Leads first, weights that sum to one."""
    ordered = []
    for members in groups:
        lead = (
            max(members, key=lambda e: (need[e], -e))
            if lead_by_need
            else cluster.nearest_member(points, members)
        )
        ordered.append((lead, *sorted(e for e in members if e != lead)))
    weights = tuple(_weights(need[list(g)]) for g in ordered)
    return Decision(tuple(ordered), weights, tuple(float(s) for s in need), view.protected).sorted()


def _weights(need: np.ndarray) -> tuple[float, ...]:
    """Shares of a cluster; an expert that nobody needed counts as the least needed one (REAM), all
    alike if none was.
    """
    positive = need[need > 0]
    filled = np.where(need > 0, need, positive.min() if len(positive) else 1.0)
    return tuple(float(w) for w in filled / filled.sum())


def saliency(view: View, weigh: str) -> np.ndarray:
    """What weighs the members: how often chosen, REAP's score, or all alike."""
    if weigh == "uniform" or view.stats is None:
        return np.ones(view.experts)
    return np.asarray(
        view.seen.total("count")[: view.experts] if weigh == "frequency" else view.seen.mean("reap")
    )


def _with_twins(
    free: list[int], room: int, kind: str, points: np.ndarray, need: np.ndarray, view: View
) -> list[list[int]]:
    """Equal experts as one, which is needed as much as all of them."""
    if room >= len(free):
        return [[e] for e in free]
    joined = twins.together(twins.found(view, free), len(free) - room)
    if not joined:
        return _cluster(free, room, kind, points, need, view)
    summed = np.array(need, dtype=np.float64)
    for one, same in joined.items():
        summed[one] = need[same].sum()
    aside = set(chain.from_iterable(joined.values())) - set(joined)
    apart = [e for e in free if e not in aside]
    found = _cluster(apart, room, kind, points, summed, view)
    return [list(chain.from_iterable(joined.get(e, [e]) for e in group)) for group in found]


def _cluster(
    free: list[int], room: int, kind: str, points: np.ndarray, need: np.ndarray, view: View
) -> list[list[int]]:
    if room >= len(free):
        return [[e] for e in free]
    if kind == "dominant":
        return _dominant(free, room, points, need)
    if kind == "ream":
        return _ream(free, room, points, need)
    mine = points[free]
    labels = (
        cluster.kmeans(mine, room, view.seed)
        if kind == "kmeans"
        else cluster.agglomerative(cluster.distances(mine), room, kind)
    )
    return [
        [free[i] for i in np.nonzero(labels == label)[0]] for label in sorted(set(labels.tolist()))
    ]


def _dominant(free: list[int], room: int, points: np.ndarray, need: np.ndarray) -> list[list[int]]:
    """The most needed lead, each other joins its nearest leader (M-SMoE, arXiv 2310.01334)."""
    order = sorted(free, key=lambda e: (-need[e], e))
    groups = {e: [e] for e in order[:room]}
    for e in order[room:]:
        near = min(groups, key=lambda g: (float(((points[g] - points[e]) ** 2).sum()), g))
        groups[near].append(e)
    return list(groups.values())


def _ream(free: list[int], room: int, points: np.ndarray, need: np.ndarray) -> list[list[int]]:
    """In falling need each leader takes its nearest free experts, at most BIG - 1 (REAM, ream.py)."""
    order = sorted(free, key=lambda e: (-need[e], e))
    left = order[room:]
    groups = []
    for e in order[:room]:
        near = sorted(left, key=lambda o: (float(((points[e] - points[o]) ** 2).sum()), o))[
            : BIG - 1
        ]
        left = [o for o in left if o not in near]
        groups.append([e, *near])
    for e in left:  # more than leaders can take: to the nearest
        min(groups, key=lambda g: (float(((points[g[0]] - points[e]) ** 2).sum()), g[0])).append(e)
    return groups


def joint(
    views: tuple[View, View], counts: tuple[int, int], weigh: str
) -> tuple[Decision, Decision]:
    """Sub-MoE's two layers at once: K-means over the experts of both, then each layer takes its
    part of every cluster home.

    The rule for bringing a cluster home (the paper has none): the members of one layer stay
    together as a cluster of that layer; a layer with too many parts joins its two nearest (average
    distance) until the number is right, one with too few lets the member furthest from its
    cluster's middle go alone.
    """
    points = cluster.embed(features.cross_cosine(*views))
    labels = cluster.kmeans(points, sum(counts), views[0].seed)
    made = []
    for number, (view, count) in enumerate(zip(views, counts, strict=True)):
        mine = points[number * view.experts : (number + 1) * view.experts]
        part = labels[number * view.experts : (number + 1) * view.experts]
        groups = [[int(e)] for e in view.protected]
        for label in sorted(set(part.tolist())):
            members = [int(e) for e in np.nonzero(part == label)[0] if e not in view.protected]
            groups += [members] if members else []
        made.append(
            finished(
                view,
                _adjusted(groups, mine, count, len(view.protected)),
                mine,
                saliency(view, weigh),
                lead_by_need=False,
            )
        )
    return made[0], made[1]


class _Far(NamedTuple):
    """An expert's distance from its cluster's middle."""

    distance: float
    group: int
    expert: int


def _adjusted(
    groups: list[list[int]], points: np.ndarray, count: int, fixed: int
) -> list[list[int]]:
    """Exactly `count` groups; the first `fixed` are left alone."""
    apart = cluster.distances(points)
    while len(groups) > count:
        pairs = combinations(range(fixed, len(groups)), 2)
        a, b = min(pairs, key=lambda p: float(apart[np.ix_(groups[p[0]], groups[p[1]])].mean()))
        groups[a] += groups.pop(b)
    while len(groups) < count:
        far: list[_Far] = []
        for i, g in enumerate(groups):
            if len(g) > 1 and i >= fixed:
                middle = points[g].mean(0)
                far += [_Far(float(np.linalg.norm(points[e] - middle)), i, e) for e in g]
        most = max(far)
        groups[most.group].remove(most.expert)
        groups.append([most.expert])
    return groups
