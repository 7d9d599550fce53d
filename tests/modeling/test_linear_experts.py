"""Experts added to single linears, each with a router of its own: written, run, written again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_adapters import adapter, tensors
from modeling.grown import IDS, apart
from modeling.test_other_experts import loaded, logits, shaken
from torch import Tensor

import moetool
from moetool.errors import MoetoolError
from moetool.modeling.block import blocks
from moetool.surgery.checkpoint import Checkpoint

Models = Callable[..., Path]
LORA: dict[str, Any] = {"site": "linear", "form": "lora", "rank": 4, "experts": 3}
SPARSE: dict[str, Any] = {"site": "linear", "form": "sparse", "delta_keep": 0.02, "experts": 3}


@pytest.mark.parametrize("options", [LORA, SPARSE], ids=["lora", "sparse"])
@pytest.mark.parametrize(
    ("family", "count"), [("llama", 7), ("qwen2", 7), ("phi3", 4), ("gpt2", 4), ("gpt_neox", 4)]
)
def test_exact_at_birth_and_itself_when_saved(
    family: str, count: int, options: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    source, out = models(family), tmp_path / "out"
    report = moetool.upcycle(str(source), str(out), layers="0,1", **options)
    assert report["certificate"]["level"] == "exact"
    moetool.verify(str(out), against=[str(source)], load=False)
    model, stock = moetool.load(out), moetool.load(source)
    assert len([*blocks(model)]) == 2 * count
    assert apart(logits(model, IDS), logits(stock, IDS)) <= 1e-5
    shaken(model, "lora_" if options is LORA else "delta_values")
    assert apart(logits(model, IDS), logits(stock, IDS)) > 1e-3
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), IDS), logits(model, IDS))


def reference(block: Any, x: Tensor, top_k: int, scale: float) -> Tensor:
    """One linear in float64, token by token."""
    held = {n: p.detach().double() for n, p in block.named_parameters()}
    rows = []
    for token in x.double():
        best, expert = (token @ held["router.weight"].T).topk(top_k)
        made = token @ held["weight"].T
        for weight, e in zip(best.softmax(-1), expert.tolist(), strict=True):
            low = token @ held[f"experts.{e}.lora_A"].T
            made = made + weight * scale * (low @ held[f"experts.{e}.lora_B"].T)
        rows.append(made)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 23])
def test_as_the_formula_says(tokens: int, models: Models, tmp_path: Path) -> None:
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), linears="v_proj,down_proj", **LORA)
    model = loaded(tmp_path / "out")
    shaken(model, "router")
    shaken(model, ".experts.")
    every = [n for n, m in model.named_modules() if m in set(blocks(model))]
    assert {n.rpartition(".")[2] for n in every} == {"v_proj", "down_proj"} and len(every) == 8
    for name in every[:2]:
        block = model.get_submodule(name)
        x = torch.randn(tokens, block.weight.shape[1])
        with torch.no_grad():
            assert apart(block(x[None])[0].double(), reference(block, x, 2, 2.0)) < 1e-5
    asked = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert asked.aux_loss > 0 and len(asked.router_logits) == 8
    asked.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "experts" in n)


def test_a_bank_of_adapters(models: Models, tmp_path: Path) -> None:
    """Adapters of attention and FFN, byte for byte; identical ones are that adapter."""
    source, out = models("llama"), tmp_path / "out"
    where = ("q_proj", "v_proj", "up_proj")
    bank = [str(adapter(tmp_path / f"{n}", seed=n, linears=where)) for n in (1, 2)]
    options: dict[str, Any] = {"site": "linear", "form": "lora", "experts": 2}
    report = moetool.upcycle(str(source), str(out), from_adapters=bank, **options)
    assert report["certificate"]["level"] == "none"
    (group,) = json.loads((out / "config.json").read_text())["moetool"]["groups"]
    assert group["params"]["linears"] == ["q_proj", "v_proj", "up_proj"]
    held, theirs = tensors(out), tensors(Path(bank[1]))
    for module, linear in (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "up_proj")):
        name = f"model.layers.2.{module}.{linear}"
        given = theirs[f"base_model.model.{name}.lora_A.weight"]
        assert torch.equal(held[f"{name}.experts.1.lora_A"], given)
    same = tmp_path / "same"
    moetool.upcycle(str(source), str(same), from_adapters=[bank[0]] * 2, **options)
    merged, seen = moetool.load(source), Checkpoint.open(same)
    for name, parameter in merged.named_parameters():
        if name.removesuffix(".weight").endswith(where):
            full = f"{name.removesuffix('.weight')}.experts.0.weight"
            parameter.data.copy_(seen.matrix(full))
    assert apart(logits(moetool.load(same), IDS), logits(merged, IDS)) <= 1e-4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**LORA, "linears": "v_prj"}, "v_proj"),
        ({**LORA, "site": "ffn", "linears": "v_proj"}, "--site linear"),
        ({"site": "linear", "form": "adapter"}, "--form lora"),
        ({**LORA, "rank": 65}, "at most"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], said: str, models: Models, tmp_path: Path) -> None:
    with pytest.raises(MoetoolError) as raised:
        moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **options)
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"


def test_no_class_routes_by_linear(models: Models, tmp_path: Path) -> None:
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **LORA)
    with pytest.raises(MoetoolError, match="a router for each linear"):
        moetool.materialize(str(tmp_path / "out"), str(tmp_path / "native"))


IMAGES: dict[str, Any] = {
    **{"site": "linear", "form": "lora", "key": "modality", "law": "hard", "experts": 1},
    **{
        "rank": 4,
        "alpha": 8,
        "linears": "q_proj,o_proj",
        "modality_ids": "5-7,9",
        "name": "images",
    },
}


def changed(stock: Any, added: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits of a stock model whose linears add 2 B A x at image tokens."""
    image, handles = torch.isin(ids, torch.tensor([5, 6, 7, 9]))[..., None], []
    for name in sorted({n.partition(".images.")[0] for n in added}):
        a, b = (added[f"{name}.images.0.lora_{one}"] for one in "AB")
        handles.append(
            stock.get_submodule(name).register_forward_hook(
                lambda m, x, y, a=a, b=b: y + image * 2.0 * (x[0] @ a.T @ b.T)
            )
        )
    made = logits(stock, ids)
    for handle in handles:
        handle.remove()
    return made


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_modality_alone_has_what_is_added(family: str, models: Models, tmp_path: Path) -> None:
    """PLoRA: text passes its linears as before, to the bit, in a mixture too."""
    source, out = models(family), tmp_path / "out"
    report = moetool.upcycle(str(source), str(out), **IMAGES)
    assert report["certificate"]["level"] == "exact"
    assert moetool.verify(str(out), against=[str(source)])["verified"]
    moetool.inspect(str(out))
    model, stock, ids = loaded(out), loaded(source), IDS.clone()
    shaken(model, "lora_")
    assert torch.equal(logits(model, ids), logits(stock, ids))
    ids[:, 3:6] = torch.tensor([5, 9, 6])
    added = {n: p.detach() for n, p in model.named_parameters() if ".images." in n}
    expected = changed(stock, added, ids)
    assert len(added) == 16 and apart(logits(model, ids), expected) < 1e-5
    assert apart(expected, logits(stock, ids)) > 1e-3
    told = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    told["attention_mask"] = torch.ones_like(ids)
    with_cache = model.generate(ids, **told)
    assert torch.equal(with_cache, model.generate(ids, **told, use_cache=False))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), ids), logits(model, ids))
    asked = model(input_ids=ids, labels=ids, output_router_logits=True)
    asked.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".images." in n)
    if family == "mixtral":  # its own routers are balanced as the stock class does it
        theirs = stock(input_ids=IDS, labels=IDS, output_router_logits=True)
        ours = model(input_ids=IDS, labels=IDS, output_router_logits=True)
        assert torch.equal(ours.aux_loss, theirs.aux_loss) and ours.loss == theirs.loss
        assert ours.router_logits[0].shape == theirs.router_logits[0].shape
        assert model(input_ids=IDS, output_router_logits=False).aux_loss is None


@pytest.mark.parametrize(
    ("change", "said"),
    [({"law": "renormalised"}, "a row of 1"), ({"key": "token"}, "unknown|allowed")],
)
def test_tokens_without_an_expert_are_read_strictly(
    change: dict[str, str], said: str, models: Models, tmp_path: Path
) -> None:
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **IMAGES)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["moetool"]["groups"][0]["route"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(MoetoolError, match=said):
        Checkpoint.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"law": "softmax"}, "text has none"),
        ({"law": "auto"}, "text has none"),
        ({"modality_ids": "7-5"}, "no numbers"),
        ({"modality_ids": "150-170"}, "no tokens of the model"),
        ({"allowed": "0/0"}, "--allowed does not fit"),
        ({"site": "ffn", "linears": "", "allowed": "0/1"}, "text has the only expert"),
    ],
)
def test_what_a_modality_cannot_be(
    options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(MoetoolError, match=said) as refused:
        moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **IMAGES | options)
    assert refused.value.hint
