"""Layers with numbers of experts of their own, over every family: written by prune, run by the class
that is derived from the stock one, exactly the source with experts taken out of its layers.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Done, tree
from test_reductions import IDS, TEXT, close, expected

import moetool
from moetool.forward.walk import Budget, Walk
from moetool.methods.reduce.decided import Decided
from moetool.surgery import groups
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.spec import whole
from moetool.surgery.text_model import text_model

Run = Callable[..., Done]


def cut(source: Path, folder: Path) -> dict[int, Any]:
    """Prune a model so that its layers keep 8, 6, 4 and 8 experts, the same of each router group;
    the decisions.
    """
    mixture = Mixture.of(Checkpoint.open(source))
    size = 8 // mixture.groups
    kept = {8: range(8), 6: (0, 2, 3, 4, 6, 7), 4: (0, 3, 5, 6)}
    if mixture.groups > 1:
        kept[6] = kept[4] = tuple(e for e in range(8) if e % size < size - 1)
    order = (8, 6, 4, 8)[-len(mixture.layers) :] if len(mixture.layers) > 2 else (6, 8)
    numbers = (*mixture.layers, *mixture.mtp_layers)
    counts = dict(zip(numbers, (*order, *[8] * len(mixture.mtp_layers)), strict=True))
    layers = {str(n): {"keep": [*kept[count]]} for n, count in counts.items()}
    said = {"schema": 1, "verb": "prune", "method": "random", "experts": 8, "layers": layers}
    (folder / "decisions.json").write_text(json.dumps(said))
    file = str(folder / "decisions.json")
    out = str(folder / "out")
    report = moetool.prune(
        str(source), out, decisions=file, uneven="ragged", method="random", refit=False, ratio=0.5
    )
    assert report["target_type"] == "moetool" and report["counts"] == "ragged"
    return dict(Decided.from_json(report["decisions"]).layers)


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=torch.from_numpy(IDS)).logits
    return made


@pytest.mark.parametrize("family", tiny.MOE)
def test_ragged(family: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Loading info empty (moetool.load refuses another), logits those of the cut layers, the same
    through the walk; saved again the same tensors and the same counts; every byte the source's.
    """
    source, out = models(family), tmp_path / "out"
    decided = cut(source, tmp_path)
    want = expected(source, decided, lambda n, block, layer: block.with_experts(layer.leads))
    model = moetool.load(out, dtype="float32")
    found = run(model)
    close(found, want)
    walk = Walk(Checkpoint.open(out), TEXT, Budget())
    walk.run()
    close(walk.logits(0, 0, 24), want)
    model.save_pretrained(tmp_path / "again")
    one, two = Checkpoint.open(out), Checkpoint.open(tmp_path / "again")
    assert one.tensors.keys() == two.tensors.keys()
    for name, stored in one.stored.items():
        assert one.read(whole(stored)) == two.read(whole(two.stored[name])), name
    counts = [{n: Mixture.of(c).count_in(n) for n in Mixture.of(c).layers} for c in (one, two)]
    assert counts[0] == counts[1] == {n: decided[n].count for n in counts[0]}
    close(run(moetool.load(tmp_path / "again", dtype="float32")), found, 1e-7)
    checked = moetool.verify(str(out), against=[str(source)])
    assert checked["verified"] == "bytes"


@pytest.fixture(scope="module")
def uneven(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ragged Mixtral: layers of 8, 6, 4 and 8 experts."""
    folder = tmp_path_factory.mktemp("ragged")
    cut(models("mixtral"), folder)
    return folder / "out"


def test_others_raise(uneven: Path) -> None:
    """Without moetool there is an error, never a model; with the package, any Auto class loads it."""
    script = """
import sys; sys.modules['moetool'] = None
from transformers import AutoModelForCausalLM as A
for trusted in (False, True):
    try:
        A.from_pretrained(sys.argv[1], trust_remote_code=trusted)
    except Exception as problem:
        print(type(problem).__name__, problem)
    else:
        print("a model")
"""
    words = [sys.executable, "-W", "ignore", "-c", script, str(uneven)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "trust_remote_code" in done.stdout and "pip install moetool" in done.stdout
    assert "a model" not in done.stdout and done.returncode == 0, done.stderr
    from transformers import AutoModel, AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(uneven, dtype="float32")
    bare, info = AutoModel.from_pretrained(uneven, dtype="float32", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        ids = torch.from_numpy(IDS)
        close(whole.lm_head(bare.eval()(input_ids=ids).last_hidden_state), run(whole), 1e-6)


def test_it_trains(uneven: Path) -> None:
    """The balance loss is the mean of each layer's own; gradients reach every expert's stack."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = moetool.load(uneven, dtype="float32").train()
    ids = torch.from_numpy(IDS)
    plain = model(input_ids=ids, labels=ids)
    made = model(input_ids=ids, labels=ids, output_router_logits=True)
    widths = [one.shape[-1] for one in made.router_logits]
    assert widths == [8, 6, 4, 8] and plain.aux_loss is None
    each = [load_balancing_loss_func((x,), x.shape[-1], 2) for x in made.router_logits]
    assert torch.allclose(made.aux_loss, torch.stack(each).mean())
    added = model.config.router_aux_loss_coef * made.aux_loss
    assert torch.allclose(made.loss, plain.loss + added) and float(added.detach()) > 0
    made.loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "experts" in n or "gate" in n]
    assert len(grads) >= 12 and all(g is not None and g.abs().max() > 0 for g in grads)


def test_trainers(uneven: Path, tmp_path: Path) -> None:
    """The Trainer moves experts of every layer, and what it saves is as it was trained; a backbone
    gives trainers that balance all layers at once logits as wide as the widest layer's.
    """
    from transformers import Trainer, TrainingArguments

    model, ids = moetool.load(uneven, dtype="float32"), torch.from_numpy(IDS)
    model.config.output_router_logits = True
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(2, 1)]
    how = {"report_to": [], "use_cpu": True, "max_steps": 2, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path / "run"), learning_rate=1e-2, **how)
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    trainer.save_model(str(tmp_path / "saved"))
    again = moetool.load(tmp_path / "saved", dtype="float32")
    assert torch.equal(run(again), run(model))
    with torch.no_grad():
        alone = model.model(input_ids=ids, output_router_logits=True).router_logits
        whole = model(input_ids=ids).router_logits
    for wide, own in zip(alone, whole, strict=True):
        assert wide.shape[-1] == 8 and torch.equal(wide[:, : own.shape[-1]], own)
        assert wide[:, own.shape[-1] :].isneginf().all()


def test_on_disk_pickled_and_checkpointed(uneven: Path, tmp_path: Path) -> None:
    """The same logits with a layer offloaded to disk, and from another process's pickle; the same
    gradients where layers are computed again.
    """
    model, ids = moetool.load(uneven, dtype="float32"), torch.from_numpy(IDS)
    parts = [n for n, _ in model.model.named_children() if n != "layers"]
    places = {f"model.{n}": "cpu" for n in parts} | {"lm_head": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(4)}
    told = {"device_map": places, "offload_folder": tmp_path}
    away = moetool.load(uneven, dtype="float32", **told)
    assert torch.equal(run(away), run(model))
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), run(model))
    grads = []
    for again in (False, True):
        model.zero_grad()
        if again:
            name = "activation_checkpointing_enable"  # of newer ones
            getattr(model, name, model.gradient_checkpointing_enable)()
        model.train()(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.slow
def test_torch_compile(uneven: Path) -> None:
    model = moetool.load(uneven, dtype="float32")
    stock = run(model)
    with torch._dynamo.config.patch(suppress_errors=False):
        close(run(torch.compile(model, backend="aot_eager")), stock, 1e-6)
    torch._dynamo.reset()


def test_settings_of_the_model_reach_its_layers(uneven: Path) -> None:
    model = moetool.load(uneven, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inner = {id(m.config) for m in model.modules() if hasattr(m, "config")}
    assert inner == {id(model.config)}
    made = model.generate(torch.from_numpy(IDS[:1, :4]), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 8)


def test_a_layer_with_fewer_experts_than_a_token_reaches() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    cls, base = tiny.MOE["qwen3_moe"]
    said = {**base, "model_type": "qwen3_moe", "architectures": [cls], "num_experts": 8}
    config = groups.ragged_config(said | {"per_layer_config": {"2": {"num_experts": 2}}})
    config |= {"allow_global_per_layer_attribute_access": True}
    read = AutoConfig.for_model("moetool").from_dict
    made = AutoModelForCausalLM.from_config(read(config))
    shapes = [m.mlp.gate.weight.shape[0] for m in made.model.layers if hasattr(m.mlp, "gate")]
    assert 2 in shapes and 8 in shapes and torch.isfinite(run(made)).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"per_layer_config": {"01": {"num_expert": 4}}}, "num_local_experts?"),
        ({"per_layer_config": {"01": {"num_local_experts": 0}}}, "a number of experts, from 1"),
        ({"per_layer_config": {"01": {"num_local_experts": True}}}, "of layer 01"),
        ({"per_layer_config": {"9": {"num_local_experts": 4}}}, "no layer '9' with experts"),
        ({"per_layer_config": {"x": {"num_local_experts": 4}}}, "no layer 'x' with experts"),
        ({"per_layer_config": {"1": {}}}, "no number of experts"),
        ({"per_layer_config": None}, "no numbers of experts by layer"),
        ({"moetool": {"version": 1, "ragged": 1}}, "true or false"),
        ({"moetool": {"version": 1, "raged": True}}, "did you mean ragged"),
        ({"moetool": {"version": 1, "ragged": False}}, "a list of no groups"),
        ({"moetool": {"version": 2, "ragged": True}}, "another version"),
    ],
)
def test_the_config_is_read_strictly(wrong: dict[str, Any], said: str, uneven: Path) -> None:
    config = json.loads((uneven / "config.json").read_text()) | wrong
    with pytest.raises(moetool.MoetoolError) as refused:
        text_model(config)
    assert said in str(refused.value)


def test_other_verbs(uneven: Path, tmp_path: Path, moetool: Run) -> None:
    """Quantized it stays what it is; pruned or materialized again it is refused in a sentence."""
    for verb in (["prune", "--method", "router-distance"], ["extend", "--copy-expert", "0"]):
        done = moetool(verb[0], uneven, tmp_path / "out", *verb[1:])
        assert done.returncode == 1 and "different numbers of experts" in done.stderr
    done = moetool("materialize", uneven, tmp_path / "out")
    assert done.returncode == 1 and "different numbers of experts" in done.stderr
    done = moetool("upcycle", uneven, tmp_path / "out")
    assert done.returncode == 1 and "already has experts" in done.stderr
    for words in (["--format", "gguf:q8_0", "--force"], ["--format", "int8", "--for", "vllm"]):
        done = moetool("quantize", uneven, tmp_path / "out", *words)
        assert done.returncode in (1, 2) and "different" in done.stderr
        assert "--uneven ghost or zeroed" in done.stderr and "bug" not in done.stderr
    made = moetool("convert-layout", uneven, tmp_path / "fused", "--to", "fused", "--json")
    assert made.json["clients"]["transformers5"]["state"] == "works"
    assert made.json["clients"]["vllm"]["state"] == "refuses"
    assert "materialize" not in json.dumps(made.json["clients"])  # which has no class for it either
    assert (made.json["source_type"], made.json["target_type"]) == ("moetool", "moetool")
    assert moetool("convert-layout", tmp_path / "fused", tmp_path / "single").returncode == 0
    one, two = Checkpoint.open(uneven), Checkpoint.open(tmp_path / "single")
    assert all(
        one.read(whole(t)) == two.read(whole(two.tensors[n])) for n, t in one.tensors.items()
    )
    text = tmp_path / "ids.jsonl"
    text.write_text('{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}\n' * 4)
    words = ["--calibrate", text, "--json"]
    seen = moetool("profile", uneven, tmp_path / "stats", *words).json
    assert [row["layer"] for row in seen["summary"]] == [0, 1, 2, 3]
    assert moetool("eval", uneven, "--text", text, "--reference", uneven).returncode == 0
    assert moetool("inspect", uneven, "--json").returncode == 0
    words = ["--format", "int8/channel", "--no-loader-check"]
    assert moetool("quantize", uneven, tmp_path / "small", *words).returncode == 0
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["model_type"] == "moetool" and config["moetool"]["ragged"] is True
    assert tree(uneven)


def test_layers_that_come_out_alike_need_no_class_of_their_own(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    """A budget may give every layer as many experts: then a stock class holds them."""
    source = str(models("mixtral"))
    report = moetool.prune(
        source, str(tmp_path / "out"), uneven="ragged", method="random", refit=False, ratio=0.5
    )
    assert report["target_type"] == "mixtral" and report["counts"] == "uniform"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mixtral" and config["num_local_experts"] == 4
    assert not {"per_layer_config", "auto_map", "moetool"} & set(config)
    assert not (tmp_path / "out" / "modeling_moetool.py").exists()
