"""How near refitted layers come on tokens that they were not solved on: of the text, and of what
stands for all other text (what the model writes itself, or random ids).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moetool.forward.batches import Batches
from moetool.methods.reduce.facts import TEXT

if TYPE_CHECKING:
    from moetool.forward.block import Block

EVERY = 8  # of so many sequences of a file one is left out


@dataclass(frozen=True)
class Parts:
    """Which tokens a layer is solved on, `fit` [tokens] bool, and on which it is only measured, by
    what they are: TEXT, or a name of forward/drawn.py.
    """

    fit: torch.Tensor
    out: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, batches: Batches) -> Parts:
        """Whole sequences, tokens in the order in which a walk sends them; a file of few sequences
        is solved on whole.
        """
        files = np.concatenate([np.full(len(b.lengths), b.file) for b in batches.batches])
        lengths = np.concatenate([b.lengths for b in batches.batches])
        left = np.zeros(len(files), bool)
        for number in range(len(batches.files)):
            mine = np.flatnonzero(files == number)
            left[mine[EVERY // 2 :: EVERY]] = True
        kinds = np.array([kind or TEXT for kind in batches.drawn or ("",) * len(batches.files)])
        out = {
            str(kind): torch.from_numpy(np.repeat(left & (kinds[files] == kind), lengths))
            for kind in dict.fromkeys(kinds.tolist())
        }
        fit = torch.from_numpy(np.repeat(~left, lengths))
        return cls(fit, {kind: where for kind, where in out.items() if bool(where.any())})


def lost(blocks: Sequence[Block], x: torch.Tensor, target: torch.Tensor) -> list[float]:
    """Relative squared error of what the routed experts of each block make of x [tokens, hidden],
    where `target` [tokens, hidden] is right.
    """
    whole = target.double().pow(2).sum().clamp_min(1e-300)
    made = (block.routed(x, block.route(x)) for block in blocks)
    apart = (float((target - out).double().pow(2).sum() / whole) for out in made)
    return [float(f"{error:.4g}") for error in apart]
