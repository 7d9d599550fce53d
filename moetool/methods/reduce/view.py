"""One layer as a criterion sees it: router rows, statistics where text was given, the block itself
where it must be run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from moetool.errors import MoetoolError, UsageError
from moetool.methods.reduce.cut import router_rows
from moetool.surgery.experts import Mixture

if TYPE_CHECKING:  # torch is not needed by methods that need no text
    from moetool.forward.stats import LayerStats


@dataclass
class View:
    """`stats` is None without text. `block` reads the layer's block (torch). `protected` are
    experts that stay, alone.
    """

    mixture: Mixture
    layer: int
    options: Any
    seed: int
    stats: LayerStats | None = None
    protected: tuple[int, ...] = ()
    device: str = "cpu"
    read_block: Callable[[], Any] | None = field(default=None, repr=False)

    @property
    def experts(self) -> int:
        return self.mixture.experts

    @cached_property
    def rows(self) -> np.ndarray:
        """Router rows [experts, hidden], float64."""
        return np.asarray(router_rows(self.mixture, self.layer))

    @cached_property
    def block(self) -> Any:
        """The layer's block (forward/block.py)."""
        if self.read_block is not None:
            return self.read_block()
        from moetool.forward import block

        return block.read(
            self.mixture, self.layer, device=self.device, widen=self.stats is not None
        )

    @property
    def seen(self) -> LayerStats:
        """The statistics; UsageError when no text was given."""
        if self.stats is None:
            raise UsageError(
                f"method {self.options.method!r} needs text",
                expected="--calibrate FILE or --stats DIR",
                found="neither",
                hint="or a method without text: router-distance, random",
            )
        return self.stats

    @cached_property
    def sample(self) -> Any:
        """Inputs of the block [tokens, hidden] (torch), as many as were kept; MoetoolError when
        none were.
        """
        import torch

        if not self.seen.has("x"):
            raise MoetoolError(
                "the statistics hold no sample of inputs",
                tensor=f"layer {self.layer}",
                hint="make them again: `moetool profile ... --sample 2048`",
            )
        return torch.from_numpy(np.array(self.seen.x)).float()

    def some(self, most: int) -> Any:
        """At most `most` tokens of the sample, evenly spaced."""
        sample = self.sample
        return (
            sample
            if len(sample) <= most
            else sample[np.linspace(0, len(sample) - 1, max(1, most)).astype(np.int64)]
        )

    def groups(self) -> list[list[int]]:
        """Experts of each group of a group-limited router; one list where there are no groups."""
        size = self.experts // self.mixture.groups
        return [list(range(g * size, (g + 1) * size)) for g in range(self.mixture.groups)]

    def share(self, count: int) -> int:
        """How many of `count` experts each router group keeps."""
        return count // self.mixture.groups
