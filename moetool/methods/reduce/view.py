"""One layer as a way sees it: router rows, statistics where text was given, the block itself where
it must be run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from moetool.errors import MoetoolError, UsageError
from moetool.methods.reduce import router_rows
from moetool.surgery.experts import Mixture

if TYPE_CHECKING:  # torch is not needed by ways that need no text
    import numpy as np
    import torch

    from moetool.forward.block import Block
    from moetool.forward.stats import LayerStats


@dataclass(frozen=True)
class Eye:
    """How all layers are looked at: by which way, with how large a sample, on which device.
    `textless`: the ways that need no text.
    """

    method: str
    sample: int
    textless: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"

    def without_text(self) -> UsageError:
        """The refusal where text is needed and there is none."""
        hint = f"--calibrate own (what the model writes itself) or random (token ids), or a method without text: {', '.join(self.textless)}"
        if self.method in self.textless:  # alone it needs none: an option does
            hint = "or leave out the options that look at text"
        return UsageError(
            f"method {self.method!r} needs text",
            expected="--calibrate FILE or --stats DIR",
            found="neither",
            hint=hint,
        )


@dataclass
class View:
    """`stats` is None without text. `block` reads the layer's block (torch). `protected` are
    experts that stay, alone.
    """

    mixture: Mixture
    layer: int
    eye: Eye
    stats: LayerStats | None = None
    protected: tuple[int, ...] = ()
    read_block: Callable[[], Block] | None = field(default=None, repr=False)

    @property
    def experts(self) -> int:
        return self.mixture.experts

    @property
    def seed(self) -> int:
        return self.eye.seed

    @cached_property
    def rows(self) -> np.ndarray:
        """Router rows [experts, hidden], float64."""
        return router_rows.read(self.mixture, self.layer)

    @cached_property
    def block(self) -> Block:
        """The layer's block (forward/block.py)."""
        if self.read_block is not None:
            return self.read_block()
        from moetool.forward import block

        return block.read(
            self.mixture, self.layer, device=self.eye.device, widen=self.stats is not None
        )

    @property
    def seen(self) -> LayerStats:
        """The statistics; UsageError when no text was given."""
        if self.stats is None:
            raise self.eye.without_text()
        return self.stats

    @cached_property
    def sample(self) -> torch.Tensor:
        """Inputs of the block [tokens, hidden], as many as were kept; MoetoolError when none
        were.
        """
        import numpy as np
        import torch

        if not self.seen.has("x"):
            raise MoetoolError(
                "the statistics hold no sample of inputs",
                tensor=f"layer {self.layer}",
                hint="make them again: `moetool profile ... --sample 2048`",
            )
        return torch.from_numpy(np.array(self.seen.x)).float().to(self.eye.device)

    def some(self, most: int) -> torch.Tensor:
        """At most `most` tokens of the sample, evenly spaced."""
        import numpy as np

        sample = self.sample
        if len(sample) <= most:
            return sample
        return sample[np.linspace(0, len(sample) - 1, max(1, most)).astype(np.int64)]

    @property
    def sampled(self) -> torch.Tensor:
        """--sample tokens."""
        return self.some(self.eye.sample)

    def groups(self) -> list[list[int]]:
        """Experts of each group of a group-limited router; one list where there are no groups."""
        size = self.experts // self.mixture.groups
        return [list(range(g * size, (g + 1) * size)) for g in range(self.mixture.groups)]

    def share(self, count: int) -> int:
        """How many of `count` experts each router group keeps."""
        return count // self.mixture.groups
