"""Super experts: the few whose enormous outputs carry the attention sinks; removing 3 of 6,144
ruins a model (arXiv 2507.23279).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

DEPTH = 0.75  # of all decoder layers, from the first
PERCENTILE = 99.5
SHARE = 0.1  # of the largest


def super_experts(largest: Mapping[int, np.ndarray], layers: int) -> dict[int, list[int]]:
    """{layer: experts} of the super experts. largest[layer] [experts]: max |output of down_proj|
    over the calibration tokens.

    Super is who lies above the 99.5th percentile of all experts and above a tenth of the largest,
    in the first 75 % of the model's decoder layers, by real layer number
    (ZunhaiSu/Super-Experts-Profilling, eval_utils.py; absolute values, where REAP's copy takes
    signed ones).
    """
    early = {n: a for n, a in largest.items() if n < round(DEPTH * layers)}
    if not early:
        return {}
    everything = np.concatenate(list(early.values()))
    limit = max(float(np.percentile(everything, PERCENTILE)), SHARE * float(everything.max()))
    found = {n: [int(e) for e in np.nonzero(a > limit)[0]] for n, a in early.items()}
    return {n: experts for n, experts in found.items() if experts}
