"""Reads quantized checkpoints with mlx-lm, and says what became of each: run with the python of its
environment (mlx[cpu] will do).

    python reading_mlx.py JOBS.json ANSWERS.json  JOBS: [[checkpoint, the same dequantized], ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def logits(folder: str) -> Any:
    """Of two fixed sequences, as numpy float32."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)  # its CPU has no other arithmetic for experts
    rows = [[10 + (7 * i + 3 * i * i + 50 * row) % 140 for i in range(24)] for row in range(2)]
    return np.array(model(mx.array(rows)))


def compare(folder: str, back: str) -> dict[str, Any]:
    """`state`: read or raises; `logits`: the largest gap by the largest spread."""
    try:
        got = logits(folder)
    except Exception as problem:  # noqa: BLE001 - it is what we ask for
        return {"state": "raises", "said": f"{type(problem).__name__}: {problem}"[:300]}
    try:
        expected = logits(back)
    except ValueError:  # it knows gpt-oss only as it was published
        return {"state": "read", "logits": None}
    spread = float((expected - expected.mean(-1, keepdims=True)).std())
    return {"state": "read", "logits": float(abs(got - expected).max()) / spread}


def main() -> int:
    jobs, answers = map(Path, sys.argv[1:])
    made = [compare(*job[:2]) for job in json.loads(jobs.read_text())]
    answers.write_text(json.dumps(made))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
