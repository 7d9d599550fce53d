"""Experts of linears that are weighed by what a pass before saw (X-LoRA): against plain hooks on the
stock model in float64, and as PEFT has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from methods.upcycled import apart
from modeling.grown import IDS
from modeling.test_other_experts import loaded, logits, shaken
from safetensors.torch import load_file, save_file
from torch import Tensor

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.text_model import text_model

Models = Callable[..., Path]
LINEARS = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")
LORA: dict[str, Any] = {"form": "lora", "site": "linear", "key": "twopass", "rank": 4, "experts": 2}
LORA |= {"linears": ",".join(LINEARS), "alpha": 6.0}
DEEP = {"classifier_depth": 4, "classifier_width": 16}
CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "deep": DEEP,
    "layerwise": DEEP | {"layerwise": True, "layers": "1,3"},
    "before": {"classifier_depth": 2, "classifier_width": 16, "pass_weight": 0.3},
    "warm": {"layerwise": True, "temperature": 0.5},
}


def trained(source: Path, out: Path, **options: Any) -> Path:
    """A model of X-LoRA whose experts and classifier are drawn anew."""
    moetool.upcycle(str(source), str(out), **(LORA | options))
    (file,) = out.glob("*.safetensors")
    held, drawn = load_file(file), torch.Generator().manual_seed(3)
    for name, tensor in held.items():
        if ".router." in name or name.endswith("lora_B"):
            held[name] = torch.randn(tensor.shape, generator=drawn) * (
                0.4 if "router" in name else 0.1
            )
    save_file(held, file, {"format": "pt"})
    return out


def classified(router: dict[str, Tensor], seen: Tensor) -> Tensor:
    """The classifier's scores [..., rows]."""
    if "into" in router:
        seen = (seen @ router["into"].T + router["into_bias"]).relu()
    for n in range(len(router.get("middle", ()))):
        seen = (seen @ router["middle"][n].T + router["middle_bias"][n]).relu()
    return seen @ router["weight"].T + router["bias"]


def reference(source: Path, out: Path, options: dict[str, Any]) -> Tensor:
    """Two passes of the stock model in float64, with what experts add hooked onto its linears."""
    model, held = tiny.load(source).double(), load_file(next(out.glob("*.safetensors")))
    held = {name: tensor.double() for name, tensor in held.items()}
    head = next(n for n in held if n.endswith("router.bias")).removesuffix("bias")
    router = {n.removeprefix(head): t for n, t in held.items() if n.startswith(head)}
    names = [n for n, _ in model.named_modules() if f"{n}.experts.0.lora_A" in held]
    weights: dict[str, Tensor] = {}

    def add(name: str, _: Any, args: tuple[Tensor], made: Tensor) -> Tensor:
        for e in range(2):
            low = args[0] @ held[f"{name}.experts.{e}.lora_A"].T
            made = (
                made
                + weights[name][..., e, None] * 1.5 * low @ held[f"{name}.experts.{e}.lora_B"].T
            )
        return made

    for name in names:
        model.get_submodule(name).register_forward_hook(partial(add, name))
        weights[name] = torch.full((*IDS.shape, 2), options.get("pass_weight", 0.0)).double()
    with torch.no_grad():
        seen = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        scores = classified(router, seen).unflatten(-1, (-1, 2)) / options.get("temperature", 1.0)
        for place, name in enumerate(names):
            own = scores[..., place if options.get("layerwise") else 0, :]
            weights[name] = own.softmax(-1)
        made: Tensor = model(input_ids=IDS).logits
    return made


@pytest.mark.parametrize("name", CASES)
def test_two_passes(name: str, models: Models, tmp_path: Path) -> None:
    source, options = models("llama"), CASES[name]
    out = trained(source, tmp_path / "out", **options)
    wanted, model = reference(source, out, options), loaded(out)
    made = logits(model, IDS)
    assert (
        apart(made.double(), wanted) < 1e-5 and apart(logits(tiny.load(source), IDS), wanted) > 1e-2
    )
    assert sum(".router." in n for n, _ in model.named_parameters()) == len(
        [n for n in Checkpoint.open(out).tensors if ".router." in n]
    )
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), IDS), made)


def test_it_starts_as_its_source_and_learns(models: Models, tmp_path: Path) -> None:
    """The classifier learns through the second pass alone; layers computed again give the same."""
    source, out = models("llama"), tmp_path / "out"
    report = moetool.upcycle(str(source), str(out), **LORA, **DEEP)
    assert report["certificate"]["level"] == "exact"
    model = loaded(out)
    assert apart(logits(model, IDS), logits(tiny.load(source), IDS)) < 1e-5
    shaken(model, "lora_B")
    grads = []
    for again in (False, True):
        model.zero_grad()
        if again:
            name = "activation_checkpointing_enable"  # of newer ones
            getattr(model, name, model.gradient_checkpointing_enable)()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    learned = [n for n in grads[0] if ".router." in n]
    assert len(learned) == 6 and all(grads[0][n].abs().max() > 0 for n in learned)
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_it_generates_without_a_cache(models: Models, tmp_path: Path) -> None:
    model = loaded(trained(models("llama"), tmp_path / "out", **DEEP))
    made = model.generate(IDS[:1, :6], max_new_tokens=4, do_sample=False)
    again = IDS[:1, :6]
    for _ in range(4):
        again = torch.cat([again, logits(model, again)[:, -1:].argmax(-1)], -1)
    assert torch.equal(made, again)
    with torch.no_grad():
        cache = tiny.load(models("llama"))(IDS[:1, :6], use_cache=True).past_key_values
    with pytest.raises(UsageError, match="no cache of it"):
        model(IDS[:1, 6:7], past_key_values=cache)


def listed(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_folder_of_x_lora(models: Models, tmp_path: Path) -> None:
    """The classifier, its rows in the order in which the stock class has its linears, and an
    adapter of PEFT for each expert; verified, kept where it stands, and replaced.
    """
    source, own, made = models("phi3"), tmp_path / "own", tmp_path / "made"
    said = DEEP | {"layerwise": True, "layers": "1,2", "linears": "qkv_proj,o_proj,down_proj"}
    trained(source, own, **said)
    report = moetool.materialize(str(own), str(made), target="peft", base="org/name")
    assert report["certificate"]["level"] == "exact" and "config.adapters" in report["warnings"][0]
    each = ["adapter_config.json", "adapter_model.safetensors"]
    inside = [f"{n}/{name}" for n in range(2) for name in each]
    assert listed(made) == [*inside, "README.md", *each, "moetool.json"]
    config = json.loads((made / "adapter_config.json").read_text())
    assert (config["xlora_depth"], config["xlora_size"], config["layerwise_scalings"]) == (
        4,
        16,
        True,
    )
    old, new = (load_file(next(f.glob("*.safetensors"))) for f in (own, made))
    (head,) = {n.rpartition(".")[0] for n in old if n.endswith("router.into")}
    stem, ours = "base_model.internal_xlora_classifier.layers.", ("qkv_proj", "o_proj", "down_proj")
    order = ("o_proj", "qkv_proj", "down_proj")  # as transformers' Phi3Attention has them
    assert torch.equal(new[f"{stem}4.weight"], old[f"{head}.middle"][1])
    rows = old[f"{head}.weight"].view(2, 3, 2, 16)[:, [ours.index(name) for name in order]]
    assert torch.equal(new[f"{stem}6.weight"], rows.reshape(12, 16)) and len(new) == 8
    for expert in range(2):
        held = load_file(made / str(expert) / each[1])
        name = "model.layers.2.mlp.down_proj"
        wanted = old[f"{name}.experts.{expert}.lora_A"]
        assert torch.equal(held[f"base_model.model.{name}.lora_A.weight"], wanted)
        told = json.loads((made / str(expert) / each[0]).read_text())
        assert (told["r"], told["lora_alpha"], len(held)) == (4, 6.0, 12)
    assert moetool.verify(str(made), against=[str(own)])["verified"] == "bytes and function"
    assert moetool.materialize(str(own), str(made), target="peft", base="org/name")["seconds"] == 0
    with pytest.raises(UsageError):
        moetool.materialize(str(own), str(made), target="peft", base="org/other")
    moetool.materialize(str(own), str(made), target="peft", base="org/other", overwrite=True)
    (made / "0" / "notes.txt").write_text("mine")
    with pytest.raises((MoetoolError, UsageError)):
        moetool.materialize(str(own), str(made), target="peft", base="org/name", overwrite=True)
    assert (made / "0" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_x_lora_is_read(name: str, models: Models, tmp_path: Path) -> None:
    """What it was written from, also with the classifier's first linear where PEFT 0.21 leaves it,
    and its linears where dropout stands between them.
    """
    source, made = models("llama"), tmp_path / "made"
    own, again = trained(source, tmp_path / "own", **CASES[name]), tmp_path / "again"
    moetool.materialize(str(own), str(made), target="peft")
    classifier = made / "adapter_model.safetensors"
    stem = "base_model.internal_xlora_classifier.layers"
    held = {n.split(".")[-2]: n for n in load_file(classifier) if n.endswith("weight")}
    moved = {old: str(int(old) // 2 * 3) for old in held}  # linear, ReLU, dropout
    old, new, first = load_file(classifier), {}, {}
    for what, tensor in old.items():
        _, number, kind = what.rsplit(".", 2)
        (new if number != "0" else first)[f"{stem}.{moved[number]}.{kind}"] = tensor
    save_file(new, classifier)
    inside = made / "0" / "adapter_model.safetensors"
    spare = {f"{stem}.{n.rpartition('.')[2]}": t for n, t in first.items()}
    save_file(load_file(inside) | spare, inside)
    config = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps(config | {"xlora_dropout_p": 0.2}))
    layers = {"layers": CASES[name].get("layers", "all")}
    asked = {"form": "lora", "site": "linear", "key": "twopass", "experts": 2, **layers}
    moetool.upcycle(str(source), str(again), from_adapters=[str(made)], **asked)
    assert apart(logits(loaded(again), IDS), logits(loaded(own), IDS)) < 1e-6
    moetool.verify(str(again), against=[str(source)], load=False)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({}, {"key": "token"}, "which looks at a pass before"),
        ({}, {"classifier_depth": 2}, "says itself what its classifier is"),
        ({"enable_softmax": False}, {}, "X-LoRA with enable_softmax"),
        ({"top_k_lora": 1}, {}, "X-LoRA with top_k_lora"),
        ({"adapters": {"a": "0", "b": "1"}}, {}, "other names than 0, 1"),
        ({"xlora_depth": 2}, {}, "a linear of the classifier is missing"),
        ({}, {"experts": 3}, "--experts 2"),
        ({"layerwise_scalings": True}, {}, "a classifier of other linears"),
    ],
)
def test_folders_of_x_lora_that_do_not_fit(
    config: dict[str, Any], options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    source, made = models("llama"), tmp_path / "made"
    moetool.upcycle(str(source), str(tmp_path / "own"), **LORA)
    moetool.materialize(str(tmp_path / "own"), str(made), target="peft")
    told = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps(told | config))
    asked = {"form": "lora", "site": "linear", "key": "twopass", "experts": 2} | options
    with pytest.raises((MoetoolError, UsageError)) as raised:
        moetool.upcycle(str(source), str(tmp_path / "out"), from_adapters=[str(made)], **asked)
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same(name: str, models: Models, tmp_path: Path) -> None:
    peft, source = pytest.importorskip("peft"), models("llama")
    own, made = trained(source, tmp_path / "own", **CASES[name]), tmp_path / "made"
    moetool.materialize(str(own), str(made), target="peft", base=str(source))
    base, config = tiny.load(source), peft.PeftConfig.from_pretrained(made)
    base.config.use_cache = False
    config.adapters = {expert: str(made / expert) for expert in config.adapters}
    model = peft.PeftModel.from_pretrained(base, made, config=config).eval()
    assert apart(logits(model, IDS), logits(loaded(own), IDS)) < 1e-5


def test_peft_finds_adapters_of_some_models_alone(models: Models, tmp_path: Path) -> None:
    said = {"form": "lora", "site": "linear", "key": "twopass", "experts": 2, "rank": 4}
    moetool.upcycle(str(models("gpt2")), str(tmp_path / "own"), **said)
    with pytest.raises(MoetoolError, match="lie in `model"):
        moetool.materialize(str(tmp_path / "own"), str(tmp_path / "made"), target="peft")
    moetool.materialize(
        str(tmp_path / "own"), str(tmp_path / "one"), target="peft", request_gates="0.5,0.5"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"site": "ffn"}, "looks at what ffn has not"),
        ({"law": "renormalised"}, "--law soft"),
        ({"linears": "down_proj"}, "sees hidden states"),
        ({"key": "token", "classifier_depth": 2}, "belong together"),
        ({"classifier_width": 10**11}, "at most 1,048,576"),
    ],
)
def test_what_does_not_go_together(
    options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    asked = {
        k: v for k, v in (LORA | options).items() if options.get("site") is None or k != "linears"
    }
    with pytest.raises((MoetoolError, UsageError)) as raised:
        moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **asked)
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"


def test_a_tower_whose_states_are_not_the_models_is_refused(models: Models, tmp_path: Path) -> None:
    """The pass before ends in the text model's hidden states: those of patches are others."""
    asked = {k: v for k, v in LORA.items() if k != "linears"} | {"tower": "vision"}
    with pytest.raises(UsageError, match="twopass looks at what a call of the text model says"):
        moetool.upcycle(str(models("llava")), str(tmp_path / "out"), **asked)


@pytest.mark.parametrize(
    "wrong", [{"modules": 7}, {"modules": True}, {"wide": 3}, {"before": -1.0}, {"middle": 1}]
)
def test_the_config_is_read_strictly(wrong: dict[str, Any], models: Models, tmp_path: Path) -> None:
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **LORA)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["moetool"]["groups"][0]["route"]["options"] = wrong
    file.write_text(json.dumps(config))
    with pytest.raises(MoetoolError):
        text_model(config)
        loaded(tmp_path / "out")
