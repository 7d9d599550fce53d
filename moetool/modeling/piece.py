"""What routers and experts are made of."""

from __future__ import annotations

import torch
from torch import nn


class GrownPart(nn.Module):
    """A module with parameters of its own and a way to fill them."""

    def unpack(self, dtype: torch.dtype) -> None:
        """Hold in full what is packed, for speed; nothing where nothing is."""

    def reset(self) -> None:
        """First values, by `transformers.initialization`, which leaves alone what was loaded."""
