"""`upcycle --carve importance`: the FFN's own neurons in another order, a router of centres, and who
runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.upcycled import IDS, apart, own_logits
from safetensors.torch import load_file

import moetool
from moetool.demo import MODEL, TEXT
from moetool.errors import UsageError
from moetool.kernels import importance

SAID: dict[str, Any] = {
    "carve": "importance",
    "split": 8,
    "carve_shared": 1,
    "calibrate": [str(TEXT)],
    "tokens": 512,
    "seq_len": 128,
    "sync": False,
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def by_hand(folder: Path, top_k: int, scale: float) -> torch.Tensor:
    """Logits of the dense model of these FFNs, each part weighted as the router says."""
    held = tensors(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    base.load_state_dict({n: t.float() for n, t in held.items() if ".router." not in n}, False)
    for number, layer in enumerate(base.model.layers):
        router = held[f"model.layers.{number}.mlp.router.weight"].float()

        def weighted(x: torch.Tensor, m: Any = layer.mlp, router: Any = router) -> torch.Tensor:
            best, where = (x @ router.T).softmax(-1).topk(top_k, -1)
            shares = torch.zeros(*x.shape[:-1], 7).scatter(-1, where, best / best.sum(-1, True))
            every = torch.cat((torch.ones(*x.shape[:-1], 1), scale * shares), -1)
            h = m.act_fn(m.gate_proj(x)) * m.up_proj(x)
            made: torch.Tensor = m.down_proj(h * every.repeat_interleave(48, -1))
            return made

        layer.mlp.forward = weighted
    with torch.no_grad():
        made: torch.Tensor = base(input_ids=IDS).logits
    return made


def test_neurons_are_the_sources_in_another_order_and_the_router_is_centres(tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    moetool.upcycle(str(MODEL), str(out), top_k=2, scale="3", **SAID)
    assert (
        json.loads((out / "moetool.json").read_text())["report"]["certificate"]["level"] == "none"
    )
    moetool.verify(str(out), against=[str(MODEL)])
    old, new = tensors(MODEL), tensors(out)
    for layer in range(4):
        at = f"model.layers.{layer}.mlp."
        names = [at + f"{m}_proj.weight" for m in ("gate", "up", "down")]
        was, now = ([held.pop(n) for n in names] for held in (old, new))
        rows = [torch.cat((g, u, d.T), 1) for g, u, d in (was, now)]
        assert torch.equal(*(r.unique(dim=0) for r in rows)) and not torch.equal(*rows)
        router = new.pop(f"{at}router.weight")
        assert router.dtype == was[0].dtype and len(router.unique(dim=0)) == 7
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)
    assert apart(own_logits(out), by_hand(out, 2, 3.0)) < 1e-5
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(again)
    saved = tensors(again)
    assert all(
        torch.equal(saved[n], t) and saved[n].dtype == t.dtype for n, t in tensors(out).items()
    )


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    moetool.upcycle(str(MODEL), str(whole), top_k=1, layers="1,2,3", **SAID)
    cut, calls = importance.order, []

    def dying(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no space left")
        return cut(*args)

    monkeypatch.setattr(importance, "order", dying)
    with pytest.raises((moetool.MoetoolError, OSError)):
        moetool.upcycle(str(MODEL), str(again), top_k=1, layers="1,2,3", **SAID)
    moetool.upcycle(str(MODEL), str(again), top_k=1, layers="1,2,3", **SAID)
    assert len(calls) == 2 + 2
    one, two = tensors(whole), tensors(again)
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"calibrate": []}, "looks at text"),
        ({"carve_shared": 8}, "--carve-shared below --split 8"),
        ({"top_k": 8}, "--top-k of 1 to 7"),
        ({"key": "neurons"}, "--key token"),
        ({"router": "zero"}, "it is the clusters' centres"),
        ({"scale": "some"}, "is not understood"),
        ({"carve_marks": 3}, "--carve-marks and --carve activation belong together"),
        ({"split": 7}, "a divisor of its width 384"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as found:
        moetool.upcycle(str(MODEL), str(tmp_path / "out"), **{"top_k": 2, **SAID, **more})
    assert says in str(found.value)
    assert not (tmp_path / "out").exists()
