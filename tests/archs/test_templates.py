"""How layouts are derived: names to templates, dimensions to formulas, modules to blocks."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from moetool.archs import generate, model, templates
from moetool.archs.templates import WORDS, Formulas, Template, Tensors, mark_layers, role_of


@pytest.mark.parametrize(
    ("name", "template", "index"),
    [
        ("model.norm.weight", "model.norm.weight", {}),
        ("h.3.ln.bias", "h.{layer}.ln.bias", {"layer": 3}),
        (
            "a.layers.3.mlp.experts.7.w1",
            "a.layers.{layer}.mlp.experts.{expert}.w1",
            {"layer": 3, "expert": 7},
        ),
        (
            "e.block.1.layer.2.mlp.experts.expert_5.wi",
            "e.block.{layer}.layer.{i1}.mlp.experts.expert_{expert}.wi",
            {"layer": 1, "i1": 2, "expert": 5},
        ),
        ("a.0.b.1.c.2", "a.{layer}.b.{i1}.c.{i2}", {"layer": 0, "i1": 1, "i2": 2}),
        ("l.0.w8.weight", "l.{layer}.w8.weight", {"layer": 0}),
        ("3", "{layer}", {"layer": 3}),
    ],
)
def test_templates(name: str, template: str, index: dict[str, int]) -> None:
    made = Template.of(name)
    assert made.name == template and made.index == index
    assert re.sub(r"\d+", "", name.replace("expert_", "")) == re.sub(
        r"\{\w+\}|\d+", "", template.replace("expert_", "")
    )


def test_outside_the_stack_nothing_is_a_layer() -> None:
    made = Template.of("visual.blocks.3.mlp.experts.1.w", layered=False)
    assert made.name == "visual.blocks.{i0}.mlp.experts.{expert}.w"
    assert Template.of("a.1.b.2", layered=False).name == "a.{i0}.b.{i1}"


ROLES = {
    "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": "expert.gate",
    "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight": "expert.down",
    "model.layers.{layer}.mlp.experts.gate_up_proj": "expert.gate_up",
    "model.layers.{layer}.mlp.experts.down_proj_bias": "expert.down_bias",
    "model.layers.{layer}.mlp.shared_experts.up_proj.weight": "shared.up",
    "model.layers.{layer}.mlp.shared_expert_gate.weight": "shared.switch",
    "model.layers.{layer}.mlp.gate.weight": "router",
    "model.layers.{layer}.mlp.gate.e_score_correction_bias": "router.bias",
    "model.layers.{layer}.ffn.gate.tid2eid": "router.ids",
    "model.layers.{layer}.mlp.gate_proj.weight": "ffn.gate",
    "model.layers.{layer}.mlp.gate_up_proj.weight": "ffn.gate_up",
    "model.layers.{layer}.mlp.down_proj.bias": "ffn.down_bias",
    "transformer.h.{layer}.mlp.c_fc.weight": "ffn.fc1",
    "model.layers.{layer}.self_attn.q_proj.weight": None,
    "vision_tower.layers.{layer}.mlp.gate_proj.weight": None,
    "model.norm.weight": None,
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name: str) -> None:
    assert role_of(name) == ROLES[name]
    dense = ROLES[name] if str(ROLES[name]).startswith("ffn.") else None
    assert role_of(name, "dense") == dense


def test_every_pattern_of_a_role_is_met_by_some_family() -> None:
    """A pattern that no family's tensor has would be dead."""
    files = [json.loads(p.read_text()) for p in (generate.HERE / "families").glob("*.json")]
    names = {t["name"] for d in files for t in d["tensors"] if t["role"]}
    stacked = {n for d in files for n in d.get("experts", {}).get("stacked", {}).values()}
    for role, pattern in WORDS["roles"]:
        assert any(re.search(pattern, n) for n in names | stacked), (role, pattern)
    assert {t["role"] for d in files for t in d["tensors"]} - {None} <= {
        r for r, _ in WORDS["roles"]
    }


# Formulas


def test_a_formula_must_hold_in_both_builds() -> None:
    first, second = {"a": 6, "b": 8, "a*b": 48}, {"a": 10, "b": 8, "a*b": 80}
    formulas = Formulas({(v, second[f]): f for f, v in first.items()}, {"t": (10, 8), "u": (6,)})
    assert formulas.shape("t", (6, 8)) == ["a", "b"]
    assert formulas.shape("u", (6,)) == [None], "6 by accident: it does not change with a"
    assert formulas.shape("absent", (48,)) == ["a*b"]
    assert formulas.shape("t", (6, 8, 1)) == ["a", "b", None], "a shape of another rank"


def test_one_build_alone() -> None:
    formulas = Formulas.of_one({"plain": 6, "also": 6, "b": 8})
    assert formulas.shape("t", (6, 8, 9)) == ["plain", "b", None]
    assert formulas.of_first().shape("t", (8,)) == ["b"]


def test_the_plainest_formula_is_taken() -> None:
    text = {
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "intermediate_size": 336,
        "n_shared_experts": 3,
        "moe_intermediate_size": 176,
        "vocab_size": 300032,
    }
    terms = templates.terms_of(text)
    assert next(iter(terms)) == "hidden_size" and terms["1"] == 1
    assert terms["num_attention_heads*head_dim"] == 240
    assert terms["num_attention_heads*head_dim+2*num_key_value_heads*head_dim"] == 400
    assert terms["2*n_shared_experts*moe_intermediate_size"] == 1056
    assert templates.fields_of(text)["shared_count"] == "n_shared_experts"
    assert "head_dim" not in templates.terms_of({"hidden_size": 8})


def test_probing_values_are_distinct() -> None:
    """Two dimensions of one value could not be told apart in a shape."""
    names = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "head_dim")
    for build in ("first", "second"):
        values = {n: WORDS[build][n] for n in names}
        terms = templates.terms_of({**WORDS[build], "head_dim": values["head_dim"]})
        assert len(set(values.values())) == len(values)
        big = [v for v in terms.values() if v > 30]
        assert len(big) - len(set(big)) <= 1, build
    same = {k for k in WORDS["second"] if WORDS["second"][k] == WORDS["first"].get(k)}
    assert not same


# Layers


def entry(name: str, layers: set[int] | None, role: str | None = None) -> dict[str, Any]:
    return {"name": name, "role": role} | ({"layers": layers} if layers else {})


@pytest.mark.parametrize(
    ("layers", "role", "mark"),
    [
        ({0, 1, 2, 3}, None, "all"),
        ({1, 2, 3}, None, "moe"),
        ({0}, None, "dense"),
        ({0, 2}, None, "some"),
        ({1, 2, 3}, "router", "moe"),
        ({None}, None, "some"),
    ],
)
def test_marks(layers: set[int], role: str | None, mark: str) -> None:
    made = mark_layers([entry("e", {1, 2, 3}, "expert.up"), entry("x", layers, role)], 4)
    assert [t["layers"] for t in made] == ["moe", mark]


def test_experts_everywhere_are_marked_as_experts() -> None:
    """So that the config, not the probe, says which layers have them."""
    tensors = [entry("e", {0, 1}, "expert.up"), entry("r", {0, 1}, "router"), entry("n", {0, 1})]
    assert [t["layers"] for t in mark_layers(tensors, 2)] == ["moe", "moe", "all"]
    assert "layers" not in mark_layers([entry("lm_head", None)], 2)[0]
    assert mark_layers([entry("x", {0})], None)[0]["layers"] == "some"


def test_a_tower_has_no_role() -> None:
    disk = {"m.layers.0.mlp.up_proj.weight": (4, 2), "code.layers.0.mlp.up_proj.weight": (4, 2)}
    tensors = Tensors(disk, frozenset(["m.layers.0.mlp.up_proj.weight"]), "dense")
    made = {t["name"]: t for t in tensors.entries(Formulas.of_one({"w": 4, "h": 2}))}
    inside = made["m.layers.{layer}.mlp.up_proj.weight"]
    outside = made["code.layers.{i0}.mlp.up_proj.weight"]
    assert inside["role"] == "ffn.up" and inside["shape"] == ["w", "h"]
    assert outside["role"] is None and outside["layers"] == {None}


# Modules


def test_common_modules() -> None:
    assert model._common(["mlp.experts", "mlp.gate"]) == "mlp"
    assert model._common(["mlp.experts", "mlp.experts"]) == "mlp.experts"
    assert model._common(["mlp.gate", "ffn.gate"]) == ""
    assert model._common(["ab.c", "ab.cd"]) == "ab"
    roles = {"mlp.experts.up": "expert.up", "mlp.gate.weight": "router"}
    assert model._block(roles) == "mlp"
    assert model._block({"mlp.experts.up": "expert.up"}) == "mlp"


@pytest.mark.parametrize("path", ["", "a", "a.b"])
def test_at(path: str) -> None:
    inner = SimpleNamespace(b=7)
    want = {"": {"a": inner}, "a": inner, "a.b": 7}[path]
    assert model.at({"a": inner}, path) == want
    assert model.at({}, "a.b") is None


def test_flags_are_the_modules_own() -> None:
    experts = nn.Module()
    experts.is_transposed, experts.is_concatenated = False, True  # type: ignore[assignment]
    holder = nn.ModuleDict({"stack": nn.ModuleList([nn.ModuleDict({"experts": experts})])})
    assert model.flags(holder, "stack") == {"is_transposed": False, "is_concatenated": True}
    assert model.flags(nn.Linear(1, 1), None) == {}


def test_an_unknown_family_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check", "surprise"]) == 0
    assert "0 families compared, 0 differ" in capsys.readouterr().out


def test_a_changed_file_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "derive", lambda *a: {"model_type": "llama", "tensors": []})
    assert generate.main(["--check", "llama", "qwen2"]) == 2
    said = capsys.readouterr()
    assert "llama: differs from" in said.err and "2 families compared, 2 differ" in said.out


def test_one_tensor_a_line() -> None:
    text = generate.render({"a": 1, "defaults": {"z": 1, "b": 2}, "tensors": [{"n": 1}, {"n": 2}]})
    assert json.loads(text) == {
        "a": 1,
        "defaults": {"z": 1, "b": 2},
        "tensors": [{"n": 1}, {"n": 2}],
    }
    assert '"defaults": {"b": 2, "z": 1}' in text and text.count("\n") == 8
