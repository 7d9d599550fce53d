"""What routers and experts are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class GrownPart(nn.Module):
    """A module with parameters of its own and a way to fill them."""

    trains_masters: bool = False  # whether what is trained is not what is written

    def unpack(self, dtype: torch.dtype) -> None:
        """Hold in full what is packed, for speed; nothing where nothing is."""

    def written(self, state: dict[str, Any], at: str) -> None:
        """Put into a state dict what is written instead of what is only trained; `at`: how names
        of this module begin in it.
        """

    def flaw(self, name: str, held: torch.Tensor) -> tuple[str, str] | None:
        """What a tensor of its own should hold and does, where a loaded one cannot be right: asked
        of every one after loading, so a pass over what is packed small, and no more.
        """
        if name.endswith("_scale") and not bool(torch.isfinite(held).all()):
            return "finite scales", "NaN or inf"
        return None

    def reset(self) -> None:
        """First values, by `transformers.initialization`, which leaves alone what was loaded."""
