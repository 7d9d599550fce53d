"""What routers and experts are made of."""

from __future__ import annotations

from torch import nn


class GrownPart(nn.Module):
    """A module with parameters of its own and a way to fill them."""

    def reset(self) -> None:
        """First values, by `transformers.initialization`, which leaves alone what was loaded."""
