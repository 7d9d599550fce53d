"""Router rows, read without torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moetool.errors import MoetoolError
from moetool.surgery.experts import Mixture
from moetool.surgery.spec import FLOATS, whole

if TYPE_CHECKING:
    import numpy as np


def read(mixture: Mixture, layer: int) -> np.ndarray:
    """Router rows of a layer's experts as float64 [experts, hidden], read without torch.
    MoetoolError where there is no plain router.
    """
    router = mixture.side(layer, "router")
    if router is None or router.stored.dtype not in FLOATS or len(router.stored.shape) != 2:
        raise MoetoolError(
            f"{mixture.layout.model_type} has no router with one row an expert",
            file=mixture.source.folder,
            tensor=f"layer {layer}",
            hint="this family cannot be cut yet",
        )
    rows: np.ndarray = mixture.source.numbers(whole(router.stored))[: mixture.experts]
    if not math.isfinite(rows.sum()):
        raise MoetoolError(
            "the rows of a router are NaN or infinite",
            file=mixture.source.folder,
            tensor=router.stored.name,
            expected="finite numbers",
            hint="repair the checkpoint: experts are compared by these rows",
        )
    return rows
