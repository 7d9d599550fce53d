"""Experts beside the FFN: attention, norms; written by the command, run in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.grown import IDS, apart
from modeling.test_other_experts import CHECKPOINTING, IMAGE, MIXED, loaded, logits, shaken
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.word import words
from moetool.modeling import routes, signals
from moetool.modeling.block import Grouped, blocks
from moetool.report.anatomy import anatomy
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import Group, Route
from moetool.surgery.reserved import RESERVED

Models = Callable[..., Path]
COPY: dict[str, Any] = {
    "key": "modality",
    "experts": 1,
    "top_k": 1,
    "modality_ids": str(IMAGE),
}
MIX: dict[str, Any] = {"experts": 3, "top_k": 3, "law": "soft", "attention_mix": "outputs"}
WAYS: dict[str, dict[str, Any]] = {
    "in front": {
        "site": "attention",
        "form": "adapter",
        "adapter_at": "before",
        "adapter_dim": 8,
        "adapter_bias": True,
        "adapter_shared_down": True,
        "key": "sequence",
        "law": "soft",
        "experts": 2,
    },
    "behind": {"site": "attention", "form": "film", "experts": 3},
    "attention": COPY | {"site": "attention"},
    "norms": COPY | {"site": "norms"},
    "top-1": {"site": "attention", "experts": 3, "top_k": 1},
    "mixed": MIX | {"site": "attention"},
    "shared-kv": MIX | {"site": "attention", "attention_shared_kv": True},
    "heads": {"site": "heads", "key": "query"},
    "routed": {"site": "heads", "law": "renormalised", "router": "zero", "shared_heads": 1},
}


def written(source: Path, out: Path, **options: Any) -> Any:
    """The report."""
    return moetool.upcycle(str(source), str(out), **{"layers": "0,1", **options})


@pytest.mark.parametrize(
    ("way", "family"),
    [
        *product(WAYS, ("llama", "qwen3")),
        *product(("attention", "norms", "top-1"), ("phi3", "gpt2", "gpt_neox")),
    ],
)
def test_exact_at_birth_and_written_again_as_it_was(
    way: str, family: str, models: Models, tmp_path: Path
) -> None:
    source, out = models(family), tmp_path / "out"
    report = written(source, out, **WAYS[way])
    assert report["certificate"]["level"] == "exact"
    model, stock = loaded(out), loaded(source)
    ids = torch.cat((IDS[:1], MIXED.expand(1, -1)), 1)
    assert apart(logits(model, ids), logits(stock, ids)) <= 1e-5
    shaken(model, ".router." if "router" in WAYS[way] else ".experts.")
    assert (apart(logits(model, ids), logits(stock, ids)) > 1e-3) == (way != "heads")
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert torch.equal(logits(again, ids), logits(model, ids))
    before, after = (load_file(f / "model.safetensors") for f in (out, tmp_path / "again"))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    same = [n for n in before if ".experts." not in n and ".router." not in n]
    assert all(torch.equal(before[n], after[n]) for n in same)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_a_cache_gives_what_the_whole_sequence_does(
    way: str, how: str, models: Models, tmp_path: Path
) -> None:
    written(models("qwen3"), tmp_path / "out", **WAYS[way])
    model = loaded(tmp_path / "out")
    model.set_attn_implementation(how)
    shaken(model, ".experts.")
    whole = logits(model, MIXED)
    with torch.no_grad():
        first = model(input_ids=MIXED[:, :3], use_cache=True)
        steps, cache = [first.logits], first.past_key_values
        for at in range(3, MIXED.shape[1]):
            made = model(input_ids=MIXED[:, at : at + 1], past_key_values=cache, use_cache=True)
            steps, cache = [*steps, made.logits], made.past_key_values
    assert apart(torch.cat(steps, 1), whole) <= 1e-5
    told = model.generate(MIXED, max_new_tokens=4, do_sample=False, use_cache=True)
    plain = model.generate(MIXED, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(told, plain)


@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing_gives_the_same_gradients(
    way: str, models: Models, tmp_path: Path
) -> None:
    written(models("llama"), tmp_path / "out", **WAYS[way])
    found = []
    for saved in (False, True):
        model = loaded(tmp_path / "out").train()
        shaken(model, ".experts.")
        if saved:
            getattr(model, CHECKPOINTING, model.gradient_checkpointing_enable)()
        model(input_ids=MIXED, labels=MIXED).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    new = ".router." if way == "routed" else ".experts."
    assert plain.keys() == again.keys() and any(new in n for n in plain) == (way != "heads")
    assert all(torch.allclose(plain[n], again[n], atol=1e-6) for n in plain)


def attention(
    weight: dict[str, Tensor],
    at: str,
    x: Tensor,
    heads: int,
    pairs: int,
    gates: Tensor | None = None,
) -> Tensor:
    """A causal attention without positions in float64, head by head; projections at `at`. `gates`:
    of values [tokens, pairs].
    """
    q, k, v = (x @ weight[f"{at}{n}_proj.weight"].T for n in "qkv")
    size, made = q.shape[-1] // heads, []
    v = v if gates is None else v * gates.repeat_interleave(size, -1)
    hidden = torch.full((len(x), len(x)), -torch.inf).triu(1).double()
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        pair = head // (heads // pairs)
        theirs = slice(pair * size, (pair + 1) * size)
        scores = (q[:, mine] @ k[:, theirs].T) * size**-0.5 + hidden
        made.append(scores.softmax(-1) @ v[:, theirs])
    return torch.cat(made, -1) @ weight[f"{at}o_proj.weight"].T


@pytest.mark.parametrize("shared", [False, True])
def test_mixed_attentions_are_the_weighted_sum_of_each(
    shared: bool, models: Models, tmp_path: Path
) -> None:
    options = WAYS["shared-kv" if shared else "mixed"] | {"router": "normal:0.5"}
    written(models("llama"), tmp_path / "out", **options)
    model = loaded(tmp_path / "out")
    shaken(model, ".experts.")
    block: Any = next(iter(blocks(model)))
    weight = {n: p.detach().double() for n, p in block.named_parameters()}
    x = torch.randn(9, block.linears.hidden, generator=torch.Generator().manual_seed(1))
    config = model.config
    flat = torch.ones(1, 9, block.head_dim), torch.zeros(1, 9, block.head_dim)  # no rotation
    with torch.no_grad():
        mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
        made, _ = block(x[None], position_embeddings=flat, attention_mask=mask)
    gate = (x.double() @ weight["router.weight"].T).softmax(-1)
    heads, pairs = config.num_attention_heads, config.num_key_value_heads
    assert heads > pairs
    want = torch.zeros_like(x.double())
    for expert in range(3):
        own = {n.removeprefix(f"experts.{expert}."): w for n, w in weight.items()}
        want += gate[:, expert, None] * attention(own, "", x.double(), heads, pairs)
    assert apart(made[0].double(), want) <= 2e-6


def test_each_token_is_projected_and_normed_by_its_own_experts(
    models: Models, tmp_path: Path
) -> None:
    written(models("llama"), tmp_path / "a", **WAYS["attention"])
    model = loaded(tmp_path / "a")
    shaken(model, ".experts.")
    block: Any = next(iter(blocks(model)))
    kinds = torch.tensor([0, 1, 1, 0])
    signals.say(block, modality=kinds[None])
    x = torch.randn(1, 4, block.linears.hidden)
    picked = block.picked(*block.held[0], x[0])
    for name in block.linears.names:
        own, copy = getattr(block, name), block.experts[0].get_submodule(name)
        rows = torch.randn(1, 4, own.in_features)
        want = torch.where(
            kinds[:, None] == 1, functional.linear(rows[0], copy.weight), own(rows[0])
        )
        assert apart(block.mixed(name, picked, rows)[0], want) <= 1e-6
    assert isinstance(block, Grouped)


def test_text_alone_is_as_before_whatever_becomes_of_the_copies(
    models: Models, tmp_path: Path
) -> None:
    for site in ("attention", "norms"):
        written(models("llama"), tmp_path / site, **WAYS[site])
        model = loaded(tmp_path / site)
        before = logits(model, IDS)
        shaken(model, ".experts.")
        assert torch.equal(logits(model, IDS), before)


def test_names_that_modules_have_are_reserved(models: Models) -> None:
    """A group of such a name would be written, and then no model could be built."""
    layer = loaded(models("llama")).model.layers[0]
    for module in (layer.mlp, layer.self_attn, layer.input_layernorm):
        own = {name for name in dir(module) if name.isidentifier() and name[0] != "_"}
        assert own - set(dict(module.named_parameters(recurse=False))) <= RESERVED | {
            name for name, _ in module.named_children()
        }


def test_routes_run_where_they_are_written() -> None:
    """A key that the command refuses at a site is refused there in a config, too."""
    for name, key in words(RouteKey).items():
        where = routes.named(name).sites
        assert not where or set(where) == set(key.sites), name


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {"site": "attn"}, "attention"),
        ("llama", {"form": "lora", "name": "act_fn"}, "is called 'act_fn' there already"),
        ("llama", {"site": "attention", "name": "train"}, "is called 'train' there already"),
        ("llama", {"site": "norms", "form": "lora"}, "--form full"),
        ("llama", {"site": "norms"}, "go --key modality"),
        ("llama", {"site": "norms", "key": "task"}, "--key task looks at what norms"),
        ("llama", {"attention_mix": "outputs", "target": "moetool"}, "--site attention"),
        ("phi3", MIX | {"site": "attention"}, "qkv_proj"),
        ("lfm2", COPY | {"site": "attention"}, "self_attn"),
        ("mixtral", COPY | {"site": "attention"}, "has experts already"),
    ],
)
def test_what_a_family_or_a_form_has_not_is_one_sentence_before_any_work(
    family: str, options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises((MoetoolError, UsageError)) as raised:
        written(models(family), tmp_path / "out", **options)
    error = raised.value
    where = getattr(error, "where", "")
    assert said in f"{error} {where} {error.hint}", f"{error} {where} {error.hint}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("group", "said"),
    [
        (Group("lora", 2, (0,), site="attention", params={"rank": 2, "alpha": 2.0}), "full"),
        (Group("full", 2, (0,), site="attention", base="beside"), "member"),
        (Group("full", 2, (0,), site="attention", base="gone", params={"mix": "output"}), "mix"),
        (
            Group("full", 2, (0,), site="attention", base="gone", params={"targets": ["q_proj"]}),
            "targets",
        ),
        (Group("full", 2, (0,), site="norms", base="member", params={"mix": "outputs"}), "mix"),
        (Group("full", 2, (0,), site="norms", base="member", route=Route(key="tokn")), "token"),
    ],
)
def test_a_config_is_read_strictly(group: Group, said: str, models: Models, tmp_path: Path) -> None:
    written(models("llama"), tmp_path / "out", **WAYS["attention"])
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["moetool"]["groups"] = [group.as_json()]
    file.write_text(json.dumps(config))
    with pytest.raises(MoetoolError) as raised:
        loaded(tmp_path / "out")
    error = raised.value
    assert said in f"{error} {error.where} {error.hint}"


STEPS: tuple[dict[str, Any], ...] = (
    {"form": "lora", "rank": 4, "experts": 3, "top_k": 2},
    COPY | {"site": "attention"},
    COPY | {"site": "norms", "name": "of_images"},
    {"form": "null", "experts": 2, "top_k": 1},
    {"form": "ternary", "experts": 2, "top_k": 1, "exact": True, "layers": "1"},
)


def test_a_model_with_groups_gets_one_more(models: Models, tmp_path: Path) -> None:
    source = models("llama")
    stock, at = logits(loaded(source), MIXED), source
    for number, options in enumerate(STEPS):
        out = tmp_path / str(number)
        assert written(at, out, **options)["certificate"]["level"] == "exact"
        before, after = (load_file(f / "model.safetensors") for f in (at, out))
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert apart(logits(loaded(out), MIXED), stock) <= 1e-5
        at = out
    found = anatomy(Checkpoint.open(at))
    assert [(g["name"], g["site"]) for g in found["groups"]] == [
        ("experts", "ffn"),
        ("experts", "attention"),
        ("of_images", "norms"),
        ("experts_2", "ffn"),
        ("experts_3", "ffn"),
    ]
    assert found["unknown_tensors"] == []
    total = sum(t.numel() for n, t in after.items() if "lora" in n) // 3  # a token has two of three
    copies = sum(t.numel() for n, t in after.items() if "self_attn.experts" in n)
    assert found["parameters"] - found["active_parameters"] >= total and copies > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (COPY | {"site": "attention"}, "stands there already"),
        ({"form": "film", "experts": 2}, "stands there already"),
        ({"form": "null", "experts": 2, "name": "router"}, "another name"),
        ({"form": "null", "experts": 2, "name": "a.b"}, "letters, digits"),
        ({}, "materialize"),
    ],
)
def test_groups_that_cannot_stand_beside_each_other(
    options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    at = models("llama")
    for number, step in enumerate(STEPS[:2]):
        written(at, tmp_path / str(number), **step)
        at = tmp_path / str(number)
    with pytest.raises((MoetoolError, UsageError)) as raised:
        written(at, tmp_path / "out", **options)
    assert said in f"{raised.value} {raised.value.hint} {getattr(raised.value, 'where', '')}"
    with pytest.raises(MoetoolError, match="no class has"):
        moetool.materialize(str(at), str(tmp_path / "native"))


def test_materialize_refuses_other_sites(models: Models, tmp_path: Path) -> None:
    written(models("llama"), tmp_path / "out", **WAYS["mixed"])
    with pytest.raises(MoetoolError, match="the site attention"):
        moetool.materialize(str(tmp_path / "out"), str(tmp_path / "native"))


@pytest.mark.parametrize("key", ["query", "token"])
def test_heads_are_chosen_by_their_queries_or_by_a_router(
    key: str, models: Models, tmp_path: Path
) -> None:
    options = {"site": "heads", "key": key, "shared_heads": 1, "active_heads": 2}
    options |= {"router": "normal:0.5"} if key == "token" else {}
    report = written(models("llama"), tmp_path / "out", **options)
    assert report["certificate"]["level"] == "none"
    model = loaded(tmp_path / "out")
    block: Any = next(iter(blocks(model)))
    heads, size = model.config.num_attention_heads, block.head_dim
    x = torch.randn(7, block.linears.hidden, generator=torch.Generator().manual_seed(1))
    queries = block.q_proj(x)
    gates = block.gates(*block.held[0], x, queries)
    scores = queries.view(7, heads, size)[:, 1:].double().norm(dim=-1)
    if key == "token":
        scores = x.double() @ block.router.weight.double().T
    want = torch.zeros(7, heads - 1).scatter_(1, scores.topk(2, -1).indices, 1.0)
    assert torch.equal(gates, torch.cat((torch.ones(7, 1), want), 1))
    flat = torch.ones(1, 7, size), torch.zeros(1, 7, size)  # no rotation
    with torch.no_grad():
        mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
        made, _ = block(x[None], position_embeddings=flat, attention_mask=mask)
    weight = {n: p.detach().double() for n, p in block.named_parameters()}
    want_out = torch.zeros_like(x.double())
    out, pairs = weight["o_proj.weight"], model.config.num_key_value_heads
    for head in range(heads):
        alone = torch.zeros_like(out)
        mine = slice(head * size, (head + 1) * size)
        alone[:, mine] = out[:, mine]
        one = weight | {"o_proj.weight": alone}
        want_out += gates[:, head, None].double() * attention(one, "", x.double(), heads, pairs)
    assert apart(made[0].double(), want_out) <= 2e-6


def test_specialists_give_ffns_and_then_attentions(models: Models, tmp_path: Path) -> None:
    seed, other = models("llama"), models("llama", seed=1)
    ffns = {"target": "moetool", "experts": 2, "top_k": 1, "law": "softmax"}
    written(seed, tmp_path / "ffn", **ffns, experts_from=[str(other)])
    mixed = MIX | {"site": "attention", "experts": 2, "top_k": 2, "experts_from": [str(other)]}
    report = written(tmp_path / "ffn", tmp_path / "out", **mixed)
    assert report["certificate"]["level"] == "none"
    made, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", other))
    layer = "model.layers.0"
    for block, linear in (("self_attn", "q_proj"), ("mlp", "up_proj")):
        own = made[f"{layer}.{block}.experts.1.{linear}.weight"]
        assert torch.equal(own, theirs[f"{layer}.{block}.{linear}.weight"])
    assert f"{layer}.mlp.up_proj.weight" not in made
    assert logits(loaded(tmp_path / "out"), IDS).isfinite().all()
