"""Every site of the registry in every stack that has it: each block computes at birth what the stock
module does, the model its source's outputs; written again as it was; text never notices what
becomes of other modalities' experts; the base comes back, or it is said why not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling import grown, stacks
from modeling.grown import apart
from modeling.stacks import STACKS, Stack
from modeling.test_other_experts import CHECKPOINTING, shaken
from modeling.test_towers import held, loaded, outputs
from torch import Tensor
from transformers import Cache

import moetool
from moetool.errors import MoetoolError
from moetool.modeling import sites
from moetool.modeling.block import Grouped, blocks
from moetool.surgery import places, towers
from moetool.surgery.layout import Layout

IMAGE = 5
MIXED = torch.tensor([[7, 11, IMAGE, IMAGE, 13, IMAGE, 17, 19]])
TEXT = torch.tensor([[7, 11, 13, 17, 19]])
_COPY = {"key": "modality", "experts": 1, "top_k": 1, "modality_ids": str(IMAGE)}
_TOKEN = {"experts": 2, "top_k": 1}
WAYS: dict[str, dict[str, Any]] = {
    "attention": _COPY,
    "cross": _TOKEN,
    "ffn": {"form": "full", **_COPY},
    "final_norm": _COPY,
    "heads": {"key": "query"},
    "linear": {"form": "lora", "rank": 2, "experts": 2, "top_k": 1},
    "mixer": _COPY,
    "norms": _COPY,
}
ELSEWHERE = {"attention": _TOKEN, "ffn": {"form": "full", "target": "moetool", **_TOKEN}}
MORE = ("mamba", "mamba2", "falcon_h1", "bamba", "zamba2", "apertus", "hunyuan_v1_dense", "exaone4")
QUICK = {
    *(f"{site}-qwen3-text" for site in WAYS),
    "norms-gemma3_text-text",
    "mixer-falcon_h1-text",
    "attention-bert-text",
    "attention-t5-decoder",
    "cross-t5-decoder",
    "attention-vit-vision",
}


def _all() -> Iterator[tuple[str, Stack]]:
    """Each site, and the stacks that have it."""
    text = partial(Stack, tower="text", auto="AutoModelForCausalLM", linears=())
    more = (
        text(family=f, cls=grown.MORE[f][0], config=grown.MORE[f][1], inputs=stacks._ids)
        for f in MORE
    )
    for stack in (*STACKS, *more):
        layout = Layout.load(stack.family)
        tower = towers.meant(layout, stack.says)
        for site in sites.sites():
            try:
                places.named(site).blocks(towers.layout_of(layout, tower, stack.config))
            except MoetoolError:
                continue
            if _is_text(stack) or WAYS[site] is not _COPY or site in ELSEWHERE:
                yield site, stack


def _is_text(stack: Stack) -> bool:
    """Whether tokens go in that can be of a modality."""
    return stack.auto == "AutoModelForCausalLM"


CASES = tuple(_all())
NO_HEADS = "the config does not say how many heads"  # of a tower beside the text model


def _marked(site: str, stack: Stack) -> Any:
    name = f"{site}-{stack.name}"
    return pytest.param(site, stack, id=name, marks=() if name in QUICK else (pytest.mark.slow,))


def test_every_site_is_here() -> None:
    assert set(WAYS) == set(sites.sites()) == {site for site, _ in CASES}
    assert len(CASES) == len({(s, k.name) for s, k in CASES}) == COUNT


COUNT = 212


@pytest.mark.parametrize(("site", "stack"), [_marked(*case) for case in CASES])
def test_as_the_stock_module_at_birth(site: str, stack: Stack, tmp_path: Path) -> None:
    source, out = stack.save(tmp_path / "source"), tmp_path / "out"
    way = WAYS[site] if _is_text(stack) else ELSEWHERE.get(site, WAYS[site])
    try:
        report = moetool.upcycle(str(source), str(out), site=site, tower=stack.says, **way)
    except MoetoolError as problem:
        assert NO_HEADS in str(problem) and site == "heads"
        return
    assert report["certificate"]["level"] == "exact"
    model, stock = loaded(stack, out), loaded(stack, source)
    worst = _beside_stock(model, stock)
    for mine, theirs in zip(outputs(stack, model), outputs(stack, stock), strict=True):
        assert apart(mine, theirs) <= 1e-5
    assert worst and max(worst.values()) <= 1e-6, worst
    model.save_pretrained(tmp_path / "again")
    before, after = held(out), held(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(before[n].dtype == t.dtype and torch.equal(before[n], t) for n, t in after.items())
    if "modality" in way.values():
        _text_stays(model, stock)
        _same_gradients(stack, out)
    _home(site, way, source, out)


def _home(site: str, way: dict[str, Any], source: Path, out: Path) -> None:
    """The base comes back, byte for byte, where it computes the same; else it is refused."""
    base = out.parent / "base"
    if "modality" not in way.values() and site != "heads":
        with pytest.raises(MoetoolError):
            moetool.materialize(str(out), str(base), target="base")
        return
    moetool.materialize(str(out), str(base), target="base")
    made, old = held(base), held(source)
    assert made.keys() == old.keys() and all(torch.equal(made[n], old[n]) for n in old)


def _beside_stock(model: Any, stock: Any) -> dict[str, float]:
    """How far each block will be from the stock module with the same input, relative, as soon as
    the model runs.
    """
    found: dict[str, float] = {}

    def compare(name: str, block: Grouped, args: Any, kwargs: Any, made: Any) -> None:
        own = {k: v for k, v in kwargs.items() if not isinstance(v, Cache)}
        with torch.no_grad():
            want = stock.get_submodule(name)(*args, **own)
        first, other = (m if isinstance(m, Tensor) else m[0] for m in (made, want))
        found[name] = apart(first, other)

    for name, module in model.named_modules():
        if isinstance(module, Grouped):
            module.register_forward_hook(partial(compare, name), with_kwargs=True)
    return found


def _text_stays(model: Any, stock: Any) -> None:
    for block in blocks(model):
        block._forward_hooks.clear()
    with torch.no_grad():
        text, mixed = model(input_ids=TEXT).logits, model(input_ids=MIXED).logits
        assert apart(text, stock(input_ids=TEXT).logits) <= 1e-5
        shaken(model, ".experts.")
        assert torch.equal(model(input_ids=TEXT).logits, text)
        assert apart(model(input_ids=MIXED).logits, mixed) > 1e-4


def _same_gradients(stack: Stack, out: Path) -> None:
    found = []
    for saved in (False, True):
        model = loaded(stack, out).train()
        if saved:
            getattr(model, CHECKPOINTING, model.gradient_checkpointing_enable)()
        kinds = (MIXED == IMAGE).long()
        torch.manual_seed(1)  # of dropout
        model(input_ids=MIXED, labels=MIXED, modality=kinds).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys() and any(".experts." in n for n in plain)
    assert all(torch.allclose(plain[n], again[n], atol=1e-6) for n in plain)
