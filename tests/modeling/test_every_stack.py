"""Groups of experts in every stack of every dense family that the data serves."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from modeling import shrunk
from modeling.grown import apart
from safetensors.torch import load_file

import moetool
from moetool.modeling import carrier
from moetool.modeling.block import GroupedBlock, blocks
from moetool.modeling.step_block import StepBlock
from moetool.surgery import ffn
from moetool.surgery.layout import DATA, Layout

CLASSES: dict[str, str] = json.loads((DATA / "index.json").read_text())["dense"]
# configs that a tiny model cannot be made of by the names of fields
NOT_SMALL = {"gemma3n_text", "qwen3_5_text", "falcon_h1"}
UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
FEW = ("nomic_bert", "marian", "mpnet", "sam")


def served(family: str) -> list[str]:
    """The towers where groups can stand."""
    found = ffn.stands(Layout.load(family))
    return [name for name, where in found if not where.startswith("nowhere")]


SERVED = {family: towers for family in CLASSES if (towers := served(family))}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(n, marks=[] if n in FEW else [pytest.mark.slow])
        for n in SERVED
        if n not in NOT_SMALL
    ],
)
def test_exact_at_birth_in_every_tower(family: str, tmp_path: Path) -> None:
    """Loaded whole, blocks compute what the family's own do, saved again it is the same."""
    cls, source = CLASSES[family], tmp_path / "source"
    stock = shrunk.model(family, cls, source)
    given = shrunk.inputs(stock)
    try:
        wanted = shrunk.outputs(stock, given)
    except UNFIT:  # its inputs are not what names tell: blocks alone are compared
        wanted = None
    for tower in SERVED[family]:
        out, again = tmp_path / tower, tmp_path / f"{tower}-again"
        said: dict[str, Any] = {"experts": 2, "top_k": 1, "form": "lora", "rank": 2}
        moetool.upcycle(str(source), str(out), tower=tower, **said)
        grown = carrier.over(getattr(transformers, cls), family)
        model, info = grown.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        assert _worst(stock, model.eval()) <= 1e-6
        if wanted is not None:
            found = shrunk.outputs(model, given)
            assert max(apart(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-5
        model.save_pretrained(again)
        old, new = (load_file(folder / "model.safetensors") for folder in (out, again))
        assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)


def _worst(stock: Any, model: Any) -> float:
    """How far the blocks are from the stock model's modules."""
    paths = {id(module): name for name, module in model.named_modules()}
    found = []
    for block in blocks(model):
        assert isinstance(block, GroupedBlock)
        own, x = stock.get_submodule(paths[id(block)]), torch.randn(7, block.linears.hidden)
        with torch.no_grad():
            found.append(apart(block.mix(x[None])[0], _own(own, block, x)))
    assert found
    return max(found)


def _own(own: Any, block: GroupedBlock, x: torch.Tensor) -> torch.Tensor:
    """What the stock module makes of rows [tokens, hidden]."""
    if isinstance(block, StepBlock):
        for step in (*block.steps, block.paths[block.linears.out]):
            x = own.get_submodule(step)(x)
        return x
    adds = "residual" in inspect.signature(own.forward).parameters
    made: torch.Tensor = own(x, torch.zeros_like(x)) if adds else own(x)
    return made
