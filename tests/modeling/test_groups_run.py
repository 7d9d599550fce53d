"""Models with groups of experts in transformers: what they compute, keep, and write again."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling import grown
from modeling.grown import IDS, apart
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import moetool as api
from moetool.errors import MoetoolError
from moetool.modeling import experts, laws, routes
from moetool.modeling.block import GroupedBlock, blocks
from moetool.surgery.groups import Group
from moetool.surgery.route import Route

Tensor = torch.Tensor
LORA = Group("lora", 4, (0, 2), params={"rank": 8, "alpha": 16.0}, route=Route(top_k=2))
BESIDE = Route(law="softmax", top_k=1)
TERNARY = Group("ternary", 4, (0, 2), base="beside", params={"output_scale": True}, route=BESIDE)
NULL = Group("null", 3, (1,), base="beside", route=BESIDE)
FULL = Group("full", 3, (0, 3), base="beside", params={"output_scale": True}, route=BESIDE)
FAMILIES = ("llama", "qwen2", "gemma2", "phi3", "llava", "qwen2_vl")
Made = Callable[..., Any]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """sources("llama") -> a tiny model, made once."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def get(family: str, dtype: str = "float32") -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = grown.base(family, root / f"{family}-{dtype}", dtype)
        return made[family, dtype]

    return get


def loaded(folder: Path, **how: Any) -> Any:
    """By the plain Auto class, with empty loading info (asserted)."""
    auto = AutoModelForCausalLM
    if "vision_config" in json.loads((folder / "config.json").read_text()):
        auto = AutoModelForImageTextToText
    model, info = auto.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(input_ids=IDS).logits
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_at_birth_and_written_again_as_it_was(
    family: str, sources: Made, tmp_path: Path
) -> None:
    source = sources(family)
    stock = logits(loaded(source))
    held = (LORA, replace(TERNARY, name="codes", layers=(1, 3)))
    folder = grown.write(source, tmp_path / "lora", *held)
    model = loaded(folder)
    assert len([*blocks(model)]) == 4 and type(model).__name__.startswith("Moe")
    assert apart(logits(model), stock) <= 1e-5
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert apart(logits(loaded(tmp_path / "again")), logits(model)) == 0
    made = model.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 9)


@pytest.mark.parametrize("group", [TERNARY, NULL, FULL, replace(TERNARY, base="beside")])
def test_experts_without_output_are_bit_equal(group: Group, sources: Made, tmp_path: Path) -> None:
    folder = grown.write(sources("llama"), tmp_path, group)
    assert torch.equal(logits(loaded(folder)), logits(loaded(sources("llama"))))


def test_registries_hold_what_there_is() -> None:
    assert {"full", "lora", "null", "ternary"} <= experts.forms().keys()
    assert {"hard", "renormalised", "soft", "softmax"} <= laws.laws().keys()
    assert {"token"} <= set(routes.keys())


def dense(block: GroupedBlock, group: Group, x: Tensor) -> Tensor:
    """Every expert in full in float64, mixed with weights that are written out here."""
    scores = (x @ getattr(block, group.router).weight.T.float()).double()
    shares, law = scores.softmax(-1), group.route.law
    best = scores.topk(group.route.top_k if law != "soft" else group.choices, -1).indices
    weight = torch.zeros_like(shares).scatter(-1, best, shares.gather(-1, best))
    if law == "renormalised":
        weight = weight / weight.sum(-1, keepdim=True)
    if law == "hard":
        weight = (weight > 0).double()
    own = {
        n: p.double()
        for n, p in block.named_parameters()
        if n.count(".") == 1 and "router" not in n
    }
    act = block.act_fn

    def ffn(w: dict[str, Tensor]) -> Tensor:
        wide = x.double()
        return (act(wide @ w["gate_proj"].T) * (wide @ w["up_proj"].T)) @ w["down_proj"].T

    base = ffn({n: own[f"{n}.weight"] for n in block.linears.names}) if own else 0
    made = [] if group.base != "member" else [base]
    for expert in range(group.experts):
        held = getattr(block, group.name)
        scale = held[expert].output_scale
        full = {n: w.double() for n, w in held.dense(block, expert).items()}
        made.append(ffn(full) * (1 if scale is None else scale.double()))
    mixed = sum(weight[:, e, None] * y for e, y in enumerate(made))
    return (base if group.base == "beside" else 0) + group.scale * mixed


CASES = [
    *(replace(LORA, route=Route(law=law, top_k=k)) for law, k in
      (("hard", 1), ("renormalised", 1), ("renormalised", 2), ("softmax", 3), ("soft", 4))),
    replace(LORA, scale=0.5, params={"rank": 4, "alpha": 4, "targets": ["up_proj"]}),
    *(replace(g, base=base) for g in (FULL, TERNARY) for base in ("beside", "member", "gone")),
    replace(TERNARY, params={"group": 32}),
    replace(NULL, base="member"),
]  # fmt: skip


@pytest.mark.parametrize("group", CASES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_block_computes_what_experts_in_full_would(
    group: Group, tokens: int, sources: Made, tmp_path: Path
) -> None:
    model = loaded(grown.write(sources("llama"), tmp_path, group, random=True))
    block = next(blocks(model))
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        assert apart(block(x[None])[0].double(), dense(block, group, x)) <= 2e-6


def test_a_model_is_copied_to_another_process(sources: Made, tmp_path: Path) -> None:
    model = loaded(grown.write(sources("llava"), tmp_path / "model", LORA, random=True))
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model) and torch.equal(logits(again), logits(model))
    asked = again.model(input_ids=IDS, output_router_logits=True)
    assert asked.aux_loss == model.model(input_ids=IDS, output_router_logits=True).aux_loss > 0
    assert type(again.config) is type(model.config) and again.config == model.config


def test_load_packed_and_unpacked(sources: Made, tmp_path: Path) -> None:
    rounded = {"activations": "int8"}
    held = (replace(TERNARY, name="plain"), replace(TERNARY, layers=(1, 3), params=rounded))
    folder = grown.write(sources("llava"), tmp_path / "model", *held, random=True)
    small, fast = api.load(folder), api.load(folder, unpack="load")
    assert type(small).__name__ == "MoeLlavaForConditionalGeneration"
    assert apart(logits(fast.eval()), logits(small.eval())) <= 1e-5
    assert apart(logits(small), logits(loaded(sources("llava")))) > 1e-3
    fast.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    with pytest.raises(MoetoolError, match="unpack='lod'"):
        api.load(folder, unpack="lod")
    with pytest.raises(MoetoolError, match="unpack='load'"):
        api.load(sources("llama"), unpack="load")


def test_what_a_config_says_wrongly_is_refused(sources: Made, tmp_path: Path) -> None:
    for change, said in (
        ({"form": "loar"}, "lora"),
        ({"base": "gone"}, "under"),
        ({"params": {"rank": 4, "alpha": 4.0, "rnk": 3}}, "rank"),
        ({"params": {"alpha": 4.0}}, "rank"),
        ({"layers": (9,)}, "0 to 3"),
        ({"route": Route(law="softmx")}, "softmax"),
        ({"route": Route(key="tokn")}, "token"),
        ({"route": Route(options={"temperature": 2})}, "temperature"),
        ({"route": Route(bias="no")}, "bool"),  # type: ignore[arg-type]
        ({"route": Route(law=5)}, "`law`"),  # type: ignore[arg-type]
        ({"site": "fnn"}, "ffn"),
        ({"scale": float("nan")}, "nan"),
        ({"name": "gate_proj"}, "gate_proj"),
        ({"layers": ()}, "at least one"),
        ({"layers": (0, 0)}, "each once"),
        ({"params": {"rank": 0, "alpha": 4.0}}, "`rank`"),
        ({"params": {"rank": 4, "alpha": float("inf")}}, "`alpha`"),
        ({"params": {"rank": 4, "alpha": 4.0, "targets": ["gate"]}}, "gate_proj"),
        ({"form": "adapter", "params": {"dim": 4, "at": "befor"}}, "before"),
    ):
        folder = grown.write(sources("llama"), tmp_path / "wrong")
        config = json.loads((folder / "config.json").read_text())
        config["moetool"]["groups"] = [replace(LORA, **change).as_json()]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(MoetoolError) as raised:
            AutoModelForCausalLM.from_pretrained(folder)
        error = raised.value
        assert said in f"{error} {error.where} {error.hint}", change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": (0,)}, "does not speak of"),  # of two
        ({"params": {"rank": 8, "alpha": 16.0, "targets": ["up_proj"]}}, "does not speak of"),
        ({"route": Route(key="always", law="soft")}, "does not speak of"),
        ({"params": {"rank": 4, "alpha": 4.0}}, "not as config.json says"),
        ({"route": Route(key="neurons")}, "is missing"),
        ({"params": {"rank": 10**9, "alpha": 4.0}}, "`rank`"),
        ({"params": {"rank": 8, "alpha": 1e308}}, "`alpha`"),
    ],
)
def test_an_edited_config_never_loads_as_another_model(
    change: dict[str, Any], said: str, sources: Made, tmp_path: Path
) -> None:
    """Transformers would only warn of tensors that nothing takes."""
    folder = grown.write(sources("llama"), tmp_path / "out", replace(LORA, layers=(0, 2)))
    config = json.loads((folder / "config.json").read_text())
    edited = replace(LORA, **{"layers": (0, 2), **change})
    config["moetool"]["groups"] = [edited.as_json()]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoetoolError) as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    assert said in str(raised.value) and raised.value.hint
