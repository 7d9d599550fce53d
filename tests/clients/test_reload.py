"""The reload matrix for the installed transformers: every family in every format, every parameter
compared by value with the dequantized one.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from clients import cells, reading, shapes
from moetool.errors import MoetoolError

LOADER = "transformers5"
FAR = 0.2  # logits by their largest: more than rounding the input of linears makes of these models


def _cells() -> list[Any]:
    slow = pytest.mark.slow
    return [
        pytest.param(f, w, marks=[slow] if w.startswith(cells.SLOW) else [], id=f"{f}-{w}")
        for f, w in product(shapes.OVERRIDES, cells.formats())
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reload")


@pytest.mark.parametrize(("family", "word"), _cells())
def test_reload(root: Path, family: str, word: str) -> None:
    cell = cells.Cell(family, word, root)
    try:
        asked = cell.choice
    except MoetoolError as refusal:
        assert refusal.where["tensor"] and refusal.hint
        pytest.skip(f"refused before any loader is asked: {refusal.message}")
    forms = {spelled.form for spelled in asked.formats.values()}
    state = cell.state(LOADER)
    answer = reading.compare(*map(str, cell.write(LOADER)))
    rounded = forms & set(cells.ROUNDS_INPUT)
    if state == "refuses":
        assert answer["state"] == "raises", answer
    elif state == "wrong":
        assert answer["state"] == "differs" or answer["logits"] > FAR, answer
    else:
        assert (state, answer["state"]) == ("works", "equal"), answer
        assert answer["logits"] <= (FAR if rounded else 0.0), answer
