"""Groups of experts in every kind of stack that transformers has: one module, two, none; text,
vision, encoder, decoder.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from modeling import stacks
from modeling.grown import apart
from modeling.stacks import BY_NAME, IDS, SLOW, STACKS, Stack
from safetensors.torch import load_file, save_file

import moetool
from moetool.errors import MoetoolError
from moetool.modeling.block import GroupedBlock, blocks
from moetool.surgery import ffn, groups, towers
from moetool.surgery.layout import Layout, families

Tensor = torch.Tensor
EXPERTS, TOP_K = 3, 2


def loaded(stack: Stack, folder: Path) -> Any:
    """By the plain Auto class, with empty loading info (asserted)."""
    auto = getattr(transformers, stack.auto)
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def outputs(stack: Stack, model: Any) -> list[Tensor]:
    """All floats that a model gives, hidden states included."""
    torch.manual_seed(0)
    with torch.no_grad():
        made = model(**stack.inputs(model.config), output_hidden_states=True)
    return [t for t in _flat(made) if t.is_floating_point()]


def _flat(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, tuple | list):
        for one in made:
            yield from _flat(one)
    elif hasattr(made, "to_tuple"):
        yield from _flat(made.to_tuple())


def held(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def test_every_kind_of_stack_is_here() -> None:
    assert len(STACKS) == 37 and len(BY_NAME) == len(STACKS) + len(SLOW)
    assert {s.tower for s in STACKS} == {"text", "vision", "encoder", "decoder"}
    asked = (
        "llama mistral qwen2 qwen3 phi3 gemma gemma2 gemma3_text gpt2 gpt_neox falcon stablelm vit "
        "dinov2 clip siglip t5 qwen2_vl llava internvl bert roberta opt"
    )
    assert set(asked.split()) <= {s.family for s in STACKS}


@pytest.mark.parametrize(
    "name",
    [*(s.name for s in STACKS), *(pytest.param(s.name, marks=pytest.mark.slow) for s in SLOW)],
)
def test_exact_at_birth_and_what_experts_in_full_would_compute(name: str, tmp_path: Path) -> None:
    stack = BY_NAME[name]
    source = stack.save(tmp_path / "source")
    stock = loaded(stack, source)
    wanted = outputs(stack, stock)
    said = {"experts": EXPERTS, "top_k": TOP_K, "form": "lora", "rank": 2, "tower": stack.says}
    out = tmp_path / "out"
    moetool.upcycle(str(source), str(out), **said)
    (group,) = groups.read(json.loads((out / "config.json").read_text()))
    assert group.tower == stack.tower
    model = loaded(stack, out)
    got = outputs(stack, model)
    assert len(got) == len(wanted) > 0
    assert max(apart(a, b) for a, b in zip(got, wanted, strict=True)) <= 1e-5
    _kept_and_added(stack, source, out)
    model.save_pretrained(tmp_path / "again")
    before, after = held(out), held(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    if hasattr(stock, "generate") and stack.tower != "vision" and stack.auto != "AutoModel":
        ids = (
            {"input_ids": IDS[:1, :4]} if "input_features" not in stack.inputs(model.config) else {}
        )
        if ids and "Masked" not in stack.auto:
            made = model.generate(**ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            assert made.shape[1] in (3, 6)
    _full(stack, stock, model)


def _kept_and_added(stack: Stack, source: Path, out: Path) -> None:
    """The source's tensors lie in the output as they were; the new ones are those of the group."""
    old, new = held(source), held(out)
    assert all(torch.equal(new.pop(n), t) for n, t in old.items())
    layers = {n.partition(".router.")[0] for n in new if n.endswith(".router.weight")}
    parts = [
        f"experts.{e}.{linear}.{p}"
        for e, linear, p in product(range(EXPERTS), stack.linears, ("lora_A", "lora_B"))
    ]
    assert set(new) == {f"{b}.{p}" for b in layers for p in (*parts, "router.weight")}
    assert len(layers) == stack.layers


def _full(stack: Stack, stock: Any, model: Any) -> None:
    """With random changes each block gives what its own FFN would with experts in full, float64."""
    torch.manual_seed(5)
    (block, *_), paths = [*blocks(model)], {id(m): n for n, m in model.named_modules()}
    assert isinstance(block, GroupedBlock)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "lora_B" in name or "router" in name:
                parameter.normal_()
    x = torch.randn(7, block.linears.hidden)
    scores = (x @ block.router.weight.T).double()
    best = scores.topk(TOP_K, -1)
    shares = best.values.softmax(-1)
    own = copy.deepcopy(stock.get_submodule(paths[id(block)])).double()
    wanted = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(EXPERTS):
        full = block.experts.dense(block, expert)
        made = _own(own, stack, {n: w.double() for n, w in full.items()}, x.double())
        wanted += (shares * (best.indices == expert)).sum(-1, keepdim=True) * made
    with torch.no_grad():
        assert apart(block.mix(x[None])[0].double(), wanted) <= 2e-6
        assert apart(block.own_ffn(x).double(), wanted) > 1e-2


def _own(own: Any, stack: Stack, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The stock FFN with these weights [out, in]; where no module is the FFN, written out."""
    with torch.no_grad():
        if "DecoderLayer" not in type(own).__name__ and "Layer" not in type(own).__name__:
            for name, weight in weights.items():
                lies = own.get_submodule(name).weight
                lies.copy_(
                    weight if lies.shape == weight.shape and stack.family != "gpt2" else weight.T
                )
            adds = "residual" in inspect.signature(own.forward).parameters
            made: Tensor = own(x, torch.zeros_like(x)) if adds else own(x)
            return made
        first, act, last = _steps(own)
        one, other = weights.values()
        return act(x @ one.T + first.bias) @ other.T + last.bias


def _steps(own: Any) -> tuple[Any, Any, Any]:
    """What a layer runs one after the other that has no module for its FFN."""
    if hasattr(own, "intermediate"):
        return own.intermediate.dense, own.intermediate.intermediate_act_fn, own.output.dense
    if hasattr(own, "ffn_output"):
        return own.ffn, own.activation, own.ffn_output
    return own.fc1, own.activation_fn, own.fc2


FORMS = [
    {"target": "moetool"},
    {"form": "adapter", "adapter_dim": 2},
    {"form": "film"},
    {"form": "null"},
    {"form": "ternary", "exact": True},
]


@pytest.mark.parametrize(("name", "said"), [*product(("bert-text", "vit-vision"), FORMS)])
def test_every_form_is_exact_where_no_module_is_the_ffn(
    name: str, said: dict[str, Any], tmp_path: Path
) -> None:
    stack = BY_NAME[name]
    source = stack.save(tmp_path / "source")
    wanted = outputs(stack, loaded(stack, source))
    moetool.upcycle(str(source), str(tmp_path / "out"), experts=2, top_k=1, layers="1", **said)
    model = loaded(stack, tmp_path / "out")
    assert len([*blocks(model)]) == 1
    got = outputs(stack, model)
    assert max(apart(a, b) for a, b in zip(got, wanted, strict=True)) <= 1e-5
    report = moetool.verify(str(tmp_path / "out"), against=[str(source)], load=False)
    assert report
    assert moetool.inspect(str(tmp_path / "out"))


def test_training_goes_through_a_layer_that_runs_its_ffn_itself(tmp_path: Path) -> None:
    """Gradients are the same whether the layer is computed once or again, and reach the router."""
    stack = BY_NAME["bert-text"]
    source = stack.save(tmp_path / "source")
    moetool.upcycle(str(source), str(tmp_path / "out"), experts=2, top_k=2, form="lora", rank=2)
    found = []
    for again in (False, True):
        model = loaded(stack, tmp_path / "out")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        model.train()
        if again:
            model.activation_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        made = model(input_ids=IDS, labels=IDS, output_router_logits=True)
        assert made.aux_loss > 0 and len(made.router_logits) == 2
        made.loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][n], g, atol=1e-7) for n, g in found[1].items())
    assert found[0]["bert.encoder.layer.0.router.weight"].abs().max() > 0
    assert "MoeBertLayer" in model._no_split_modules


def test_two_towers_of_one_model_have_groups_of_their_own(tmp_path: Path) -> None:
    stack = BY_NAME["clip-vision"]
    source = stack.save(tmp_path / "source")
    wanted = outputs(stack, loaded(stack, source))
    said = {"experts": 2, "top_k": 1, "target": "moetool"}
    moetool.upcycle(str(source), str(tmp_path / "one"), tower="vision", layers="1", **said)
    out = tmp_path / "out"
    moetool.upcycle(str(tmp_path / "one"), str(out), tower="text", router="zero", **said)
    model = loaded(stack, out)
    named = {n for n, m in model.named_modules() if isinstance(m, GroupedBlock)}
    layers = ("vision_model.encoder.layers.1", *(f"text_model.encoder.layers.{n}" for n in (0, 1)))
    assert named == {f"{layer}.mlp" for layer in layers}
    got = outputs(stack, model)
    assert max(apart(a, b) for a, b in zip(got, wanted, strict=True)) <= 1e-5
    asked = model(**stack.inputs(model.config), output_router_logits=True)
    assert [len(scores) for scores in asked.router_logits] == [18, 18, 10]
    assert asked.aux_loss > 0
    found = moetool.inspect(str(out))
    assert [group["tower"] for group in found["groups"]] == ["vision", "text"]
    assert not found["unknown_tensors"]
    rows = {(row.get("tower", ""), row["layer"]): row["experts"] for row in found["layers"]}
    assert [rows["text", 0], rows["text", 1], rows["vision", 1]] == [2, 2, 2]
    routers = 3 * 2 * 16
    idle = (2 * (2 * 16 * 32 + 48)) + 2 * 16 * 24 + 40
    assert found["parameters"] - found["active_parameters"] == idle
    assert found["parameters"] > routers


def test_verify_feeds_what_a_model_takes(tmp_path: Path) -> None:
    for name, compared in (
        ("vit-vision", True),
        ("whisper-encoder", True),
        ("llava-vision", False),
    ):
        stack, out = BY_NAME[name], tmp_path / f"{name}-out"
        source = stack.save(tmp_path / name)
        said = {"form": "ternary", "experts": 2, "top_k": 1, "tower": stack.says}
        moetool.upcycle(str(source), str(out), **said)
        found = moetool.verify(str(out), against=[str(source)], load=True)
        if compared:
            assert found["logits"]["relative"] > 1e-4 and found["logits"]["greedy_tokens"] == 0
        else:
            assert "does not go through the vision tower" in found["logits_skipped"]


def test_archs_show_says_where_experts_can_stand() -> None:
    found = {
        n: dict(ffn.stands(Layout.load(n))) for n in ("opt", "t5", "bloom", "mamba", "mixtral")
    }
    assert found["opt"] == {"text": "model.decoder.layers.{layer}.experts"}
    assert found["t5"]["decoder"] == "decoder.block.{layer}.layer.2.DenseReluDense.experts"
    assert found["bloom"]["text"] == "transformer.h.{layer}.mlp.experts"
    assert "nowhere" in found["mamba"]["text"]
    assert not found["mixtral"]


def test_a_tower_under_older_names_is_read_and_written_under_todays(tmp_path: Path) -> None:
    """LLaVA as it lies on the Hub."""
    stack, source = BY_NAME["llava-vision"], tmp_path / "source"
    stack.save(source)
    hub = {
        n.replace("vision_tower.", "vision_tower.vision_model."): t for n, t in held(source).items()
    }
    save_file(hub, source / "model.safetensors", {"format": "pt"})
    wanted = outputs(stack, loaded(stack, source))
    said = {"experts": 2, "top_k": 1, "form": "lora", "rank": 2, "tower": "vision"}
    moetool.upcycle(str(source), str(tmp_path / "out"), **said)
    model = loaded(stack, tmp_path / "out")
    assert all(map(torch.equal, outputs(stack, model), wanted))
    assert {type(b).__name__ for b in blocks(model)} == {"MoeCLIPMLP"}
    assert not moetool.inspect(str(tmp_path / "out"))["unknown_tensors"]
    assert moetool.verify(str(tmp_path / "out"), against=[str(source)], load=False)
    model.save_pretrained(tmp_path / "again")
    assert held(tmp_path / "again").keys() == held(tmp_path / "out").keys()


_ABSENT = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["moetool"] = None
import transformers
for folder, *classes in (one.split(",") for one in sys.argv[1:]):
    for name in classes:
        for how in ({}, {"trust_remote_code": True}):
            try:
                getattr(transformers, name).from_pretrained(folder, **how)
            except Exception as problem:
                print("REFUSED", problem)
            else:
                print("LOADED", name, folder)
"""


@pytest.mark.slow
def test_without_moetool_no_class_loads_one(tmp_path: Path) -> None:
    told = []
    for name in ("bert-text", "vit-vision", "t5-encoder", "clip-vision", "llava-vision"):
        stack, out = BY_NAME[name], tmp_path / f"{name}-out"
        said = {"form": "lora", "rank": 2, "experts": 2, "tower": stack.says}
        moetool.upcycle(str(stack.save(tmp_path / name)), str(out), **said)
        told.append(f"{out},{stack.auto},AutoModel,{stack.cls}")
    env = os.environ | {"HF_HOME": str(tmp_path), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", _ABSENT, *told]
    run = {"capture_output": True, "text": True, "env": env, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, check=False, **run)
    assert "LOADED" not in done.stdout, done.stdout
    assert done.stdout.count("REFUSED") == 5 * 3 * 2, done.stdout + done.stderr


def test_what_cannot_be_is_said_before_any_work(tmp_path: Path) -> None:
    sources = {n: BY_NAME[n].save(tmp_path / n) for n in ("t5-encoder", "bert-text", "llava-text")}
    for name, said, wanted in (
        ("t5-encoder", {}, "encoder, decoder"),
        ("bert-text", {"tower": "vision"}, "has no vision tower"),
        (
            "llava-text",
            {"tower": "vision", "form": "lora", "key": "modality"},
            "what a call of the text model says",
        ),
        ("llava-text", {"tower": "vison"}, "vision"),
        ("llava-text", {"tower": "vision", "layers": "7"}, "0 to 1"),
    ):
        with pytest.raises(MoetoolError) as raised:
            moetool.upcycle(
                str(sources[name]), str(tmp_path / "out"), **{"form": "null", "top_k": 1} | said
            )
        error = raised.value
        assert wanted in f"{error} {error.where} {error.hint}", said
        assert not (tmp_path / "out").exists()
    with pytest.raises(MoetoolError, match="tower"):
        moetool.upcycle(str(sources["llava-text"]), str(tmp_path / "out"), tower="vision")


def test_a_tower_in_a_config_is_read_strictly(tmp_path: Path) -> None:
    stack = BY_NAME["bert-text"]
    source = stack.save(tmp_path / "source")
    moetool.upcycle(str(source), str(tmp_path / "out"), experts=2, top_k=1, form="null")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for tower, route, said in (
        ("vison", {}, "no vison tower"),
        ("vision", {}, "no vision tower"),
        (3, {}, "`tower`"),
        ("vision", {"key": "modality"}, "in another tower"),
    ):
        config["moetool"]["groups"][0] |= {"tower": tower, "route": route}
        path.write_text(json.dumps(config))
        with pytest.raises(MoetoolError) as raised:
            transformers.AutoModel.from_pretrained(tmp_path / "out")
        assert said in f"{raised.value} {raised.value.where}", tower


def test_towers_are_data_of_many_families() -> None:
    found = {n: towers.names(Layout.load(n)) for n in families()["dense"]}
    assert sum(bool(names) for names in found.values()) == 319
    assert sum("vision" in names for names in found.values()) == 117
    assert {*chain.from_iterable(found.values())} == {*towers.KNOWN}
    assert found["t5"] == ["encoder", "decoder"] and found["llava"] == [
        "text",
        "vision",
        "projector",
    ]
    assert stacks.PIXELS.shape[-1] == 16


def test_a_way_that_the_ffn_is_run_in_and_nothing_is_known_of_is_refused(tmp_path: Path) -> None:
    """Under this flag Bloom's class multiplies with slices of the last linear itself."""
    stack = BY_NAME["bloom-text"]
    stack = stack._replace(config=stack.config | {"slow_but_exact": True, "pretraining_tp": 2})
    source = stack.save(tmp_path / "source")
    with pytest.raises(MoetoolError, match="nothing is known of"):
        moetool.upcycle(str(source), str(tmp_path / "out"), experts=2, top_k=1, form="null")
