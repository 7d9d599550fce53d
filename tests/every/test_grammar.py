"""Every form of experts with every key, law and site that upcycle takes: loaded, run, saved, trained
and generated with, or refused with a next step.

The words come from the registries: a new one is tried by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.test_other_experts import loaded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moetool
from moetool.errors import MoetoolError
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.methods.upcycle.laws.law import RouteLaw
from moetool.methods.upcycle.word import words
from moetool.surgery import groups, places

Models = Callable[..., Path]
FOUND = 206  # what upcycle takes of those
SMALL = {"num_hidden_layers": 1}
IDS = torch.randint(10, 150, (2, 12), generator=torch.Generator().manual_seed(1))
IDS[:, 4] = 7  # an image's
# What a word cannot do without.
BESIDE: dict[str, dict[str, Any]] = {
    "full": {"target": "moetool"},
    "modality": {"modality_ids": "7"},
    "twopass": {"classifier_width": 8},
    "carved": {
        "carve": "activation",
        "split": 8,
        "carve_marks": 4,
        "calibrate": "random",
        "tokens": 64,
        "seq_len": 32,
    },
}
CALLS = {"noise": torch.tensor([0.3, -1.2]), "task": torch.tensor([1, 0])}


def cases() -> Iterator[dict[str, Any]]:
    """Every form with every key and every law, at every site."""
    for form, site in product(ExpertKind.known(), places.known()):
        keys = ((key, "auto") for key in words(RouteKey))
        laws = (("token", law) for law in words(RouteLaw))
        for key, law in chain(keys, laws):
            said: dict[str, Any] = {"form": form, "site": site, "key": key, "law": law}
            yield said | BESIDE.get(form, {}) | BESIDE.get(key, {})


@pytest.mark.slow
def test_every_word_with_every_other(models: Models, tmp_path: Path) -> None:
    source, taken = models("llama", **SMALL), 0
    save_file({"d": torch.randn(4, 12)}, tmp_path / "domains.safetensors")
    stock = loaded(source)
    for number, said in enumerate(cases()):
        out = tmp_path / str(number)
        count = (
            {"domains": str(tmp_path / "domains.safetensors")} if said["key"] == "domain" else {}
        )
        count |= {} if said["form"] in ("carved", "heads") else {"experts": 4}
        try:
            report = moetool.upcycle(str(source), str(out), sync=False, **said, **count)
        except MoetoolError as refused:
            assert refused.hint and not out.exists(), said
            continue
        taken += 1
        call = {k: v for k, v in CALLS.items() if k == said["key"]}
        held(out, stock, call, report["certificate"]["level"], str(said))
    assert taken == FOUND


def held(out: Path, stock: Any, call: dict[str, Any], level: str, said: str) -> None:
    """One model: its source at birth where that is promised; the same bytes and numbers saved; the
    same logits with a cache and without, and the same gradients with checkpoints.
    """
    model = loaded(out)
    if level == "exact":
        assert near(run(model, call), run(stock, {}), 1e-5), said
    model.save_pretrained(out / "again")
    old, new = written(out), written(out / "again")
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old), said
    draw = torch.Generator().manual_seed(3)
    base = dict(stock.named_parameters())
    own = ((n, p) for n, p in model.named_parameters() if n not in base and "scale" not in n)
    for _, part in own:
        if part.is_floating_point():
            part.data.add_(torch.randn(part.shape, generator=draw) * 0.05)
    there = run(model, call)
    model.save_pretrained(out / "again")
    assert torch.equal(run(loaded(out / "again"), call), there), said
    config = json.loads((out / "config.json").read_text())
    (group,) = groups.read(config)
    if not group.route.note(group.experts):
        generated(model, call, said)
    trained(model, call, said)
    assert run(model.to(torch.bfloat16), call).isfinite().all(), said


def written(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def run(model: Any, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(input_ids=IDS, **call).logits
    return made


def near(one: Tensor, other: Tensor, most: float) -> bool:
    return float((one - other).abs().max()) <= most * float(other.abs().max())


def generated(model: Any, call: dict[str, Any], said: str) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    how = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "pad_token_id": 0}
    how |= {"return_dict_in_generate": True, "eos_token_id": None}
    with_it, without = (
        model.generate(input_ids=IDS, attention_mask=mask, use_cache=cache, **call, **how)
        for cache in (True, False)
    )
    assert torch.equal(with_it.sequences, without.sequences), said
    assert near(torch.stack(with_it.logits), torch.stack(without.logits), 1e-4), said


def trained(model: Any, call: dict[str, Any], said: str) -> None:
    gradients: list[dict[str, Tensor]] = []
    model.train()
    for checkpoints in (False, True):
        if checkpoints:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=IDS, **call).logits.square().mean().backward()
        each: Iterator[tuple[str, nn.Parameter]] = model.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in each if p.grad is not None})
    model.activation_checkpointing_disable()
    model.eval()
    plain, other = gradients
    assert plain.keys() == other.keys(), said
    assert all(torch.allclose(plain[n], other[n], atol=1e-5, rtol=1e-4) for n in plain), said
