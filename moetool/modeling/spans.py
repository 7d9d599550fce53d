"""Which part of a prompt counts, by the ids of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Span(NamedTuple):
    """From the first token among `begin`, or the first of all, up to the next among `end`, or the
    last of all; nothing said: all.
    """

    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def of(self, ids: Tensor, kept: Tensor) -> Tensor:
        """ids, and which of them are no padding [batch, length] -> [batch, length], bool. The token
        that ends it is none of it; where no token begins it, all before the end counts.
        """
        begins = _among(ids, self.begin) & kept
        begun = begins.int().cumsum(-1) > 0
        begun = begun | ~begins.any(-1, keepdim=True)
        ended = (_among(ids, self.end) & kept & begun).int().cumsum(-1) > 0
        return kept & begun & ~ended


def _among(ids: Tensor, some: tuple[int, ...]) -> Tensor:
    return torch.isin(ids, torch.tensor(some, dtype=ids.dtype, device=ids.device))
