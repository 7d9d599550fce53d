"""Which neurons of an FFN fire together, and what parts that makes (CMoE, arXiv 2502.04416;
JarvisPei/CMoE, CMoE_utils.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moetool.kernels import cluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def unit_rows(matrix: Tensor) -> Tensor:
    """[rows, width], each row over its length; a row of zeros stays."""
    from torch.nn import functional

    return functional.normalize(matrix, dim=-1)


def strongest(
    x: Tensor, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor], most: int
) -> Tensor:
    """The `most` neurons that fire most on each token [tokens, most], of |act(gate x) * (up x)|
    with inputs [tokens, hidden] and the rows of gate and up [neurons, hidden] of length one.
    """
    x = unit_rows(x)
    return (act(x @ gate.T) * (x @ up.T)).abs().topk(most, -1).indices


class Carved(NamedTuple):
    """`order`: all neurons [width], those of the shared part first (by how often they fire), then
    expert after expert, of each first the neuron that stands for it; `shared`: the share of all
    marks that lie in the shared part.
    """

    order: np.ndarray
    shared: float


def parts(marks: np.ndarray, width: int, split: int, shared: int) -> Carved:
    """Cut an FFN of `width` neurons in `split` parts of one size. marks [tokens, most]: which
    neurons fire most on each token.

    The neurons that are marked most often are the first `shared` parts. The others are clustered
    once by L1 distance of who was marked when: the next most often marked ones are the centres, the
    assignment is balanced and of least cost, and what is nearest the mean of a cluster stands for
    it.
    """
    wide = width // split
    counts = np.bincount(marks.ravel(), minlength=width)
    ranked = np.argsort(-counts, kind="stable")
    always, rest = ranked[: wide * shared], np.sort(ranked[wide * shared :])
    centres = ranked[wide * shared :][: split - shared]
    both = np.stack([_together(marks, centre, width) for centre in centres], 1)
    # |a - b| of two columns of 0 and 1 is |a| + |b| - 2 ab
    far = counts[rest, None] + counts[None, centres] - 2 * both[rest]
    labels = cluster.evenly(far)
    groups = [_led(marks, rest[labels == c], width) for c in range(split - shared)]
    order = np.concatenate([always, *groups])
    return Carved(order, float(counts[always].sum() / max(1, counts.sum())))


def _together(marks: np.ndarray, neuron: int, width: int) -> np.ndarray:
    """On how many tokens each neuron is marked together with this one [width]."""
    return np.bincount(marks[(marks == neuron).any(1)].ravel(), minlength=width)


def _led(marks: np.ndarray, members: np.ndarray, width: int) -> np.ndarray:
    """The members of a cluster, first the one that is nearest its mean by L1 distance."""
    mine = np.zeros(width, bool)
    mine[members] = True
    hit = mine[marks]
    mean = hit.sum(1) / len(members)  # of each token
    # the distance of a column of 0 and 1 from the mean, less the sum of the mean
    gain = np.broadcast_to((1.0 - 2.0 * mean)[:, None], marks.shape)[hit]
    far = np.bincount(marks[hit], weights=gain, minlength=width)[members]
    lead = int(far.argmin())
    return np.concatenate([members[lead : lead + 1], np.delete(members, lead)])
