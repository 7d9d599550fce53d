"""Asks mlx-lm for logits in float32, as logits_transformers.py does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from logits_transformers import answer


def logits(folder: str, rows: list[list[int]]) -> Any:
    """Numpy float32 [rows, places, vocabulary]."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)  # its CPU has no other arithmetic for experts
    return np.array(model(mx.array(rows)))


if __name__ == "__main__":
    answer(logits, *sys.argv[1:])
