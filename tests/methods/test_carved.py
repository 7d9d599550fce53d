"""`upcycle --carve activation`: the FFN's own neurons in another order, and who runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.upcycled import IDS, apart, own_logits
from safetensors.torch import load_file
from torch.nn import functional

import moetool
from moetool.demo import MODEL, TEXT
from moetool.errors import UsageError

SAID: dict[str, Any] = {
    "carve": "activation",
    "calibrate": [str(TEXT)],
    "tokens": 512,
    "seq_len": 128,
    "carve_marks": 4,
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_neurons_are_the_sources_in_another_order_and_the_best_parts_run(tmp_path: Path) -> None:
    """By value: every tensor outside the FFNs, the FFNs' neurons, the router's rows, and the logits
    against a forward written here.
    """
    out = tmp_path / "out"
    moetool.upcycle(str(MODEL), str(out), split=8, carve_shared=2, top_k=2, **SAID)
    report = json.loads((out / "moetool.json").read_text())["report"]
    assert report["certificate"]["level"] == "none"
    assert (report["experts"], report["expert_width"]) == (6, 48)
    idle = 4 * 3 * 384 * 128 * 4 // 8
    assert report["parameters"] - report["active_parameters"] == idle
    moetool.verify(str(out), against=[str(MODEL)])  # planned again from the tables of moetool.json
    old, new = tensors(MODEL), tensors(out)
    for layer in range(4):
        at = f"model.layers.{layer}.mlp."
        names = [at + f"{m}_proj.weight" for m in ("gate", "up", "down")]
        was, now = ([held.pop(n) for n in names] for held in (old, new))
        rows = [torch.cat((g, u, d.T), 1) for g, u, d in (was, now)]
        assert torch.equal(*(r.unique(dim=0) for r in rows))
        assert not torch.equal(*rows)
        leads = range(2 * 48, 384, 48)
        for matrix, name in zip(now, ("gate", "up"), strict=False):
            unit = functional.normalize(matrix[leads].float(), dim=-1)
            assert torch.allclose(new.pop(f"{at}router.{name}").float(), unit, atol=1e-3, rtol=4e-3)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[n], new[n]) for n in old)
    assert apart(own_logits(out), by_hand(out, 2, 48, 2)) < 1e-5


def by_hand(folder: Path, shared: int, wide: int, top_k: int) -> torch.Tensor:
    """Logits of the dense model of these FFNs, neurons of parts that do not run set to zero."""
    held = tensors(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    base.load_state_dict({n: t.float() for n, t in held.items() if ".router." not in n}, False)
    for number, layer in enumerate(base.model.layers):
        gate, up = (held[f"model.layers.{number}.mlp.router.{n}"].float() for n in ("gate", "up"))

        def masked(
            x: torch.Tensor, m: Any = layer.mlp, gate: Any = gate, up: Any = up
        ) -> torch.Tensor:
            best = (functional.silu(x @ gate.T) * (x @ up.T)).abs().topk(top_k, -1).indices
            runs = torch.zeros(*x.shape[:-1], len(gate)).scatter(-1, best, 1.0)
            every = torch.cat((torch.ones(*x.shape[:-1], shared), runs), -1)
            h = functional.silu(m.gate_proj(x)) * m.up_proj(x)
            made: torch.Tensor = m.down_proj(h * every.repeat_interleave(wide, -1))
            return made

        layer.mlp.forward = masked
    with torch.no_grad():
        made: torch.Tensor = base(input_ids=IDS).logits
    return made


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_all_parts_running_is_the_dense_model(
    family: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where gate and up lie in one matrix, and where only one layer is cut."""
    source, out = models(family), tmp_path / "out"
    said = SAID | {"calibrate": "random"}
    moetool.upcycle(str(source), str(out), split=4, carve_shared=1, top_k=3, layers="1", **said)
    assert (
        json.loads((out / "moetool.json").read_text())["report"]["certificate"]["level"] == "exact"
    )
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        assert apart(own_logits(out), dense(input_ids=IDS).logits) < 1e-5
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    block = model.model.layers[1].mlp
    x = torch.randn(5, block.linears.hidden, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = block.experts._neurons(block, x, 0, 1) + sum(
            block.experts.of(block, e, x) for e in range(3)
        )
        assert apart(parts, block.own_ffn(x)) < 1e-5


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was cut before is taken up: the layers that are done are not looked at again."""
    from moetool.kernels import fires

    whole, again = tmp_path / "whole", tmp_path / "again"
    said = SAID | {"split": 8, "top_k": 2}
    moetool.upcycle(str(MODEL), str(whole), **said)
    cut, calls = fires.parts, []

    def dying(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise OSError("no space left")
        return cut(*args)

    monkeypatch.setattr(fires, "parts", dying)
    with pytest.raises(moetool.MoetoolError, match="cannot go on"):
        moetool.upcycle(str(MODEL), str(again), **said)
    moetool.upcycle(str(MODEL), str(again), **said)
    assert len(calls) == 3 + 2
    one, two = tensors(whole), tensors(again)
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_where_it_goes_without_moetool(tmp_path: Path) -> None:
    """Nowhere, with the reason; but where all parts run it is a dense model."""
    some, every, base = (tmp_path / name for name in ("some", "every", "base"))
    for out, top_k in ((some, 2), (every, 7)):
        moetool.upcycle(str(MODEL), str(out), split=8, carve_shared=1, top_k=top_k, **SAID)
    for target, says in (
        ("auto", "no class has a router with an activation"),
        ("peft", "holds part experts, and PEFT's adapters are low-rank"),
        ("base", "computes something else"),
    ):
        with pytest.raises(moetool.MoetoolError, match=says):
            moetool.materialize(str(some), str(tmp_path / "none"), target=target)
    moetool.materialize(str(every), str(base), target="base")
    config = json.loads((base / "config.json").read_text())
    assert config["model_type"] == "llama" and len(tensors(base)) == len(tensors(MODEL))
    assert apart(own_logits(base), own_logits(MODEL)) < 1e-5


def test_workers_and_dry_runs_change_no_byte(tmp_path: Path) -> None:
    said = SAID | {"split": 8, "top_k": 2, "max_shard_size": "500KB"}
    plan = moetool.upcycle(str(MODEL), str(tmp_path / "none"), dry_run=True, **said)
    assert not list(tmp_path.iterdir())
    for jobs in (1, 3):
        report = moetool.upcycle(str(MODEL), str(tmp_path / f"{jobs}"), jobs=jobs, **said)
        assert report["plan_digest"] == plan["plan_digest"]
    one, three = (sorted((tmp_path / n).glob("*.safetensors")) for n in "13")
    assert len(one) > 2 and [a.read_bytes() for a in one] == [b.read_bytes() for b in three]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"calibrate": []}, "looks at text"),
        ({"carve_shared": 8}, "--carve-shared below --split 8"),
        ({"top_k": 7}, "--top-k of 1 to 6"),
        ({"experts": 4}, "--experts 6"),
        ({"key": "noise"}, "--key neurons"),
        ({"law": "renormalised"}, "--law hard"),
        ({"carve_marks": 385}, "--carve-marks up to 384"),
        ({"split": 7}, "a divisor of its width 384"),
        ({"target": "mixtral"}, "--target moetool"),
        ({"carve": "kmeans"}, "belong together"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    said = {"split": 8, "top_k": 2, **SAID, **more}
    with pytest.raises(UsageError) as found:
        moetool.upcycle(str(MODEL), str(tmp_path / "out"), **said)
    assert says in str(found.value)
    assert not (tmp_path / "out").exists()
