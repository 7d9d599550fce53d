"""A tiny trained Llama (0.9 M parameters, bfloat16) that ships with moetool, so that the first
command needs no download.
"""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "model"
TEXT = Path(__file__).parent / "text.txt"
