"""Asks vLLM's CPU build, in float32, as logits_transformers.py does. It gives no logits: an answer
is [rows, what]: the five most probable tokens of every place but the last, their log-probabilities,
and the tokens that greedy decoding adds.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from itertools import chain
from typing import Any

TOP, MORE = 5, 12
AGAIN = 75  # exit code: what a model left behind is in the way of the next one
LEFT = "parallel group is not initialized"


def logits(folder: str, rows: list[list[int]]) -> Any:
    """Numpy [rows, (places - 1) * 2 * TOP + MORE]: tokens, log-probabilities, decoded tokens.
    RuntimeError with its own words; the process ends where it cannot go on.
    """
    said = ""
    try:
        return _logits(folder, rows)
    except Exception as problem:  # noqa: BLE001 - it is what we ask for
        (*_, last) = traceback.extract_tb(problem.__traceback__)
        said = f"{type(problem).__name__}: {str(problem) or last.line}"
    gc.collect()  # what the exception held, before the next model begins
    if LEFT in said:
        os._exit(AGAIN)
    raise RuntimeError(said)


def _logits(folder: str, rows: list[list[int]]) -> Any:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = None
    asked = SamplingParams(
        max_tokens=MORE, prompt_logprobs=TOP, detokenize=False, temperature=0, ignore_eos=True
    )
    try:
        engine = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=2,
            enable_prefix_caching=False,
        )
        prompts = [{"prompt_token_ids": row} for row in rows]
        return [flat(made) for made in engine.generate(prompts, asked, use_tqdm=False)]
    finally:
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()


def flat(made: Any) -> list[float]:
    """What one row got, as one list of numbers."""
    steps = [
        sorted(step.items(), key=lambda pair: -pair[1].logprob)[:TOP]
        for step in made.prompt_logprobs
        if step
    ]
    best = list(chain.from_iterable(steps))
    tokens, found = [float(token) for token, _ in best], [held.logprob for _, held in best]
    return [*tokens, *found, *map(float, made.outputs[0].token_ids)]


if __name__ == "__main__":
    from logits_transformers import answer  # beside this file, for the client's python
    from reading_vllm import SETTINGS

    os.environ.update(SETTINGS)
    answer(logits, *sys.argv[1:])
