"""Asks llama.cpp what it makes of GGUF files: run with the python of its environment.

    python reading_llamacpp.py JOBS.json ANSWERS.npz

JOBS: {name: {"file": model.gguf, "rows": [[token, ...], ...], "texts": [text, ...]}}. ANSWERS has
`NAME/logits` float32 [rows, places, vocabulary] and `NAME/tokens/NUMBER` for each text; for a file
that it refuses `NAME/refused`, its own words. Keys and values stay in float32, and weights as they
lie (its repacked kernels use instructions that virtual machines may lack).
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as lib

WORDS: list[str] = []
BIG = 1 << 16


@lib.llama_log_callback
def keep(level: int, text: bytes, data: Any) -> None:  # held, or the library calls freed memory
    WORDS.append(text.decode("utf-8", "replace"))


def logits(model: Any, rows: list[list[int]]) -> np.ndarray:
    """[rows, places, vocabulary]."""
    width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    how = lib.llama_context_default_params()
    how.n_ctx = how.n_batch = how.n_ubatch = max(map(len, rows))
    how.n_threads = how.n_threads_batch = 1
    how.type_k = how.type_v = how.flash_attn_type = 0
    made = []
    for row in rows:
        context = lib.llama_init_from_model(model, how)
        batch = lib.llama_batch_init(len(row), 0, 1)
        batch.n_tokens = len(row)
        for place, token in enumerate(row):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        assert lib.llama_decode(context, batch) == 0, WORDS[-5:]
        held = lib.llama_get_logits(context)
        made.append(
            np.ctypeslib.as_array(held, shape=(len(row) * width,)).reshape(-1, width).copy()
        )
        lib.llama_batch_free(batch)
        lib.llama_free(context)
    return np.stack(made)


def tokens(model: Any, text: str) -> np.ndarray:
    """The text's tokens, with those that the file says are added."""
    vocab, data = lib.llama_model_get_vocab(model), text.encode()
    found = (lib.llama_token * BIG)()
    count = lib.llama_tokenize(vocab, data, len(data), found, BIG, True, True)
    return np.array(found[:count])


def answer(name: str, job: Any) -> dict[str, Any]:
    how = lib.llama_model_default_params()
    how.n_gpu_layers, how.use_extra_bufts = 0, False
    WORDS.clear()
    model = lib.llama_model_load_from_file(job["file"].encode(), how)
    if not model:
        return {f"{name}/refused": np.array("".join(WORDS)[-2000:])}
    made = {}
    if job.get("rows"):
        made[f"{name}/logits"] = logits(model, job["rows"])
    for number, text in enumerate(job.get("texts", ())):
        made[f"{name}/tokens/{number}"] = tokens(model, text)
    lib.llama_model_free(model)
    return made


def main() -> None:
    lib.llama_log_set(keep, ctypes.c_void_p(0))
    lib.llama_backend_init()
    made: dict[str, Any] = {}
    for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
        made |= answer(name, job)
    np.savez(sys.argv[2], **made)


if __name__ == "__main__":
    main()
