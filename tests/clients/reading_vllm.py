"""Reads quantized checkpoints with vLLM's CPU build, and says what became of each: run with the
python of its environment. It repacks weights when it loads, so that only what comes out can be
compared: log-probabilities of the checkpoint and of the same dequantized, both by vLLM in bf16.

    python reading_vllm.py JOBS.json ANSWERS.json    JOBS: [[checkpoint, dequantized, source], ...]

One family a process: after a dense model vLLM has no groups for experts.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def rows() -> list[list[int]]:
    """Two fixed sequences of tokens."""
    return [[10 + (7 * i + 3 * i * i + 50 * row) % 140 for i in range(24)] for row in range(2)]


def logits(folder: str) -> Any:
    """Log-probabilities at every place, float32 [rows, places - 1, vocabulary]."""
    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    asked = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False, temperature=0)
    try:
        made = engine.generate([{"prompt_token_ids": row} for row in rows()], asked, use_tqdm=False)
        places = [[step for step in one.prompt_logprobs if step] for one in made]
        return np.array(
            [[[step[n].logprob for n in range(len(step))] for step in row] for row in places]
        )
    finally:
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()


def compare(folder: str, back: str, source: str, known: dict[str, Any]) -> dict[str, Any]:
    """`state`: read or raises; `kl`: of the checkpoint from the dequantized; `rounding`: of the
    source from the dequantized, which is what quantization changes.
    """
    import numpy as np

    try:
        got = logits(folder)
    except Exception as problem:  # noqa: BLE001 - it is what we ask for
        return {"state": "raises", "said": f"{type(problem).__name__}: {problem}"[:300]}
    for path in (back, source):
        known[path] = known[path] if path in known else logits(path)
    expected = known[back]

    def kl(other: Any) -> float:
        return float((np.exp(expected) * (expected - other)).sum(-1).mean())

    return {"state": "read", "kl": kl(got), "rounding": kl(known[source])}


def main() -> int:
    jobs, answers = map(Path, sys.argv[1:])
    os.environ.update(SETTINGS)
    known: dict[str, Any] = {}
    made = []
    for job in json.loads(jobs.read_text()):
        made.append(compare(*job, known))
        answers.write_text(json.dumps(made))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
