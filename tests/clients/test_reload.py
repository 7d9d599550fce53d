"""The reload matrix for the installed transformers: every family in every format, every parameter
compared by value with the dequantized one.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from clients import cells, reading, shapes
from moetool import verbs
from moetool.errors import MoetoolError
from moetool.surgery import clients
from moetool.surgery.clients import Assigned
from moetool.surgery.forms.fp8_block import Fp8Block

LOADER = "transformers5"


def _cells() -> list[Any]:
    slow = pytest.mark.slow
    return [
        pytest.param(f, w, marks=[slow] if w.startswith(cells.SLOW) else [], id=f"{f}-{w}")
        for f, w in product(shapes.OVERRIDES, cells.formats())
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reload")


def checked(cell: cells.Cell) -> dict[str, Any]:
    """What the loader makes of a cell; it must be what the data says."""
    forms = {spelled.form for spelled in cell.choice.formats.values()}
    near, state = max(cells.NEAR.get(form, 0.0) for form in forms), cell.state(LOADER)
    answer = reading.compare(*map(str, cell.write(LOADER)))
    if state == "refuses":
        assert answer["state"] == "raises", answer
    elif state == "wrong":
        assert answer["state"] == "differs" or answer["linears"] > max(near, 0.1), answer
    else:
        assert (state, answer["state"]) == ("works", "equal"), answer
        assert answer["linears"] <= near and (near or answer["logits"] == 0), answer
    return answer


@pytest.mark.parametrize(("family", "word"), _cells())
def test_every_family_in_every_format(root: Path, family: str, word: str) -> None:
    cell = cells.Cell(family, word, root)
    try:
        assert cell.choice.formats
    except MoetoolError as refusal:
        assert refusal.hint
        pytest.skip(f"refused before any loader is asked: {refusal.message}")
    checked(cell)


@pytest.mark.parametrize(
    ("family", "plan", "state"),
    [
        ("qwen3_moe", "experts=int4,attn=int8,lm_head=int8", "works"),
        ("qwen3_moe", "experts=mxfp4,attn=fp8", "works"),
        ("qwen3_moe", "experts=int4/64,attn=nvfp4", "works"),
        ("qwen3_moe", "attn=fp8", "works"),
        ("qwen3_moe", "attn=nf4", "works"),
        ("qwen3_moe", "attn=int4", "refuses"),
        ("qwen3_moe", "attn=nvfp4", "refuses"),
        ("qwen3_moe", "experts=int4,embed=int8", "wrong"),
        ("gpt_oss", "attn=int4,lm_head=int8", "works"),
        ("gpt_oss", "attn=ternary", "wrong"),
        ("llama", "attn=int4,dense=int8/channel", "works"),
        ("llama", "attn=fp8,embed=fp8", "wrong"),
        ("llama", "attn=nf4,lm_head=nf4", "works"),
    ],
)
def test_plans_of_several_formats(root: Path, family: str, plan: str, state: str) -> None:
    cell = cells.Cell(family, plan, root, plan)
    assert cell.state(LOADER) == state
    checked(cell)


def test_experts_of_two_widths_are_refused_and_read_wrongly(root: Path) -> None:
    """Layer 0 in 8 bits, layer 1 in 4: moetool reads it as it is, transformers 5 without a word as
    something else.
    """
    shapes.save("mixtral", root / "wide", intermediate_size=256)  # narrower ones raise
    made = {w: cells.Cell("wide", w, root).write(LOADER)[0] for w in ("int8", "int4")}
    mixed, back = root / "two-widths", root / "two-widths-back"
    shapes.mix(made, mixed)
    verbs.make("dequantize")(str(mixed), str(back))
    answer = reading.compare(str(mixed), str(back))
    assert answer["state"] == "differs" and answer["worst"] > 1
    experts = [
        Assigned("experts", "packed_int", {"bits": bits, "group": 128}, layer=layer)
        for layer, bits in enumerate((8, 4))
    ]
    assert [r.state for r in clients.refusals(LOADER, experts)] == ["wrong"]


def test_blocks_at_an_edge_are_refused_and_read_wrongly(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "edge"
    shapes.save("llama", folder, intermediate_size=320)
    cell = cells.Cell("edge", "fp8-block", root)
    with pytest.raises(MoetoolError, match="128 does not divide"):
        assert cell.choice
    monkeypatch.setattr(Fp8Block, "misfit", lambda *_: "")
    assert cell.state(LOADER) == "wrong"
    answer = reading.compare(*map(str, cell.write(LOADER)))
    assert answer["state"] in ("differs", "raises"), answer
