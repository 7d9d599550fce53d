"""Asks llama.cpp for logits of GGUF files, as logits_transformers.py does of folders."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import reading_llamacpp as reading
from logits_transformers import answer
from reading_llamacpp import lib


def logits(file: str, rows: list[list[int]]) -> Any:
    """Numpy float32 [rows, places, vocabulary]; RuntimeError with its own words."""
    how = lib.llama_model_default_params()
    how.n_gpu_layers, how.use_extra_bufts = 0, False
    reading.WORDS.clear()
    model = lib.llama_model_load_from_file(file.encode(), how)
    if not model:
        said = [w.strip() for w in reading.WORDS if "error" in w]
        raise RuntimeError(" ".join(said)[-300:])
    try:
        return reading.logits(model, rows)
    finally:
        lib.llama_model_free(model)


if __name__ == "__main__":
    lib.llama_log_set(reading.keep, ctypes.c_void_p(0))
    lib.llama_backend_init()
    answer(logits, *sys.argv[1:])
