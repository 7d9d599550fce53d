"""`upcycle --split` with experts of moetool's own: parts of the FFN behind any route, cut without
text, against the dense model in float64 whose neurons are set to zero.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.upcycled import IDS, apart, own_logits, train
from safetensors.torch import load_file, save_file
from torch import Tensor

import moetool
from moetool.demo import MODEL
from moetool.errors import UsageError

Models = Callable[..., Path]
OUT = {"phi3": "down_proj", "gpt2": "c_proj", "gpt_neox": "dense_4h_to_h", "llama": "down_proj"}
PATCH = 10


def read(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@torch.no_grad()
def dense(folder: Path, out: Path, weigh: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Logits in float64 of the stock model with the tensors of `out`. `weigh`: what it makes of an
    FFN's router and input: the weight of each part.
    """
    held, stock = read(out), out.parent / f"{out.name}-stock"
    stock.mkdir()
    shutil.copy(folder / "config.json", stock)
    own = {n: t for n, t in held.items() if ".router." not in n}
    save_file(own, stock / "model.safetensors", {"format": "pt"})
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(stock, dtype=torch.float64).eval()
    last_one = OUT[model.config.model_type]
    for name, module in model.named_modules():
        if not name.endswith(".mlp"):
            continue
        saw, router = [], held[f"{name}.router.weight"].double()

        def first(module: Any, args: Any, saw: list[Tensor] = saw) -> None:
            saw[:] = args

        def last(module: Any, args: Any, saw: Any = saw, router: Tensor = router) -> Any:
            each = weigh(router, saw[0])
            return (args[0] * each.repeat_interleave(args[0].shape[-1] // each.shape[-1], -1),)

        module.register_forward_pre_hook(first)
        getattr(module, last_one).register_forward_pre_hook(last)
    return model(input_ids=IDS).logits.float()


def best(router: Tensor, x: Tensor, k: int, shared: float = 0.0) -> Tensor:
    """1 for the best k, or their shares of the softmax times `shared`."""
    found, chosen = (x @ router.T).topk(k, -1)
    each = found.softmax(-1) * shared if shared else torch.ones_like(found)
    return x.new_zeros(*x.shape[:-1], len(router)).scatter(-1, chosen, each)


def by_patch(router: Tensor, x: Tensor, k: int) -> Tensor:
    """Of each PATCH tokens beside each other, zero where they end."""
    batch, length, _ = x.shape
    wide = torch.cat((x, x.new_zeros(batch, -length % PATCH, x.shape[-1])), 1)
    chosen = best(router, wide.reshape(batch, -1, PATCH * x.shape[-1]), k)
    return chosen.repeat_interleave(PATCH, 1)[:, :length]


@pytest.mark.parametrize(
    ("family", "carve"),
    [("llama", "contiguous"), ("phi3", "random"), ("gpt2", "random"), ("gpt_neox", "random")],
)
def test_the_best_parts_run_and_a_bias_counts_once(
    family: str, carve: str, models: Models, tmp_path: Path
) -> None:
    source, out = models(family), tmp_path / "out"
    cut = {"experts": 4, "split": 4, "carve": carve, "target": "moetool"}
    moetool.upcycle(str(source), str(out), top_k=2, **cut)
    certificate = json.loads((out / "moetool.json").read_text())["report"]["certificate"]
    assert (certificate["level"], certificate["coverage"]) == ("none", 0.5)
    moetool.verify(str(out), against=[str(source)])
    old, new = read(source), read(out)
    assert {n for n in new if ".router." not in n} == old.keys()
    assert all(
        torch.equal(old[n], new[n]) for n in old if carve == "contiguous" or ".mlp." not in n
    )
    train(out)
    made = own_logits(out)
    assert apart(made, dense(source, out, partial(best, k=2))) < 1e-5
    assert apart(made, own_logits(source)) > 1e-3
    again = tmp_path / "again"
    transformers.AutoModelForCausalLM.from_pretrained(out).save_pretrained(again)
    held, kept = read(out), read(again)
    assert kept.keys() == held.keys() and all(torch.equal(kept[n], held[n]) for n in held)


@pytest.mark.parametrize("family", OUT)
def test_all_parts_running_is_the_dense_model(family: str, models: Models, tmp_path: Path) -> None:
    source = models(family)
    for n, told in enumerate(({"law": "hard"}, {"law": "renormalised", "router": "zero"})):
        out = tmp_path / str(n)
        said = {"experts": 4, "split": 4, "top_k": 4, "carve": "kmeans:up", **told}
        report = moetool.upcycle(str(source), str(out), form="parts", **said)
        assert report["certificate"]["level"] == "exact"
        assert apart(own_logits(out), own_logits(source)) < 1e-5


def test_parts_of_a_patch_and_by_shares(tmp_path: Path) -> None:
    """The route of UoE; and shares that sum to one, times the number of parts."""
    patch: dict[str, Any] = {"key": "sequence", "patch": PATCH}
    shares: dict[str, Any] = {"target": "moetool", "law": "renormalised"}
    asked = ((patch, by_patch, 3), (shares, partial(best, shared=4.0), 3))
    for n, (told, weigh, k) in enumerate(asked):
        out = tmp_path / str(n)
        moetool.upcycle(str(MODEL), str(out), experts=4, split=4, top_k=k, **told)
        train(out)
        made = dense(MODEL, out, partial(weigh, k=k))
        assert apart(own_logits(out), made) < 1e-5


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"experts": 8, "split": 4, "target": "moetool"}, "as many experts as parts"),
        ({"experts": 4, "split": 4, "key": "neurons"}, "--carve activation"),
        ({"experts": 4, "split": 4, "form": "parts", "carve": "importance"}, "without text"),
        ({"experts": 4, "split": 4, "key": "sequence", "shared": True}, "--shared does nothing"),
        ({"experts": 5, "split": 5, "form": "parts"}, "cannot be cut"),
    ],
)
def test_what_parts_do_not_go_with(told: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        moetool.upcycle(str(MODEL), str(tmp_path / "out"), **told)
    assert said in str(raised.value)


def test_neurons_that_look_at_each_other_are_no_parts(tmp_path: Path) -> None:
    """A norm over all of them lies before the last linear."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.BitNetConfig(**sizes, **heads)
    transformers.BitNetForCausalLM(config).save_pretrained(tmp_path / "src")
    with pytest.raises(UsageError, match="do not add up"):
        said: dict[str, Any] = {"experts": 4, "split": 4, "form": "parts", "top_k": 2}
        moetool.upcycle(str(tmp_path / "src"), str(tmp_path / "out"), **said)
