"""Conversions as data: every rule means what it says, every field and tensor is accounted for."""

from __future__ import annotations

import dataclasses
import json
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from moetool.errors import MoetoolError
from moetool.surgery import pair as pairing
from moetool.surgery.layout import DATA, Layout
from moetool.surgery.pair import Condition, Pair, map_config, map_tensor, pairs, rope

PLAIN = [p for p in pairs() if p.inner is None]
ROOT = Path(__file__).resolve().parents[2]


def both(pair: Pair) -> tuple[Layout, Layout]:
    return Layout.load(pair.source), Layout.load(pair.target)


def named(source: str, target: str) -> Pair:
    return next(p for p in pairs() if (p.source, p.target) == (source, target))


def config_of(source: Layout, **changed: Any) -> dict[str, Any]:
    """A config of a family: the class's defaults, some of them changed in its text part."""
    config = {k: v for k, v in source.defaults.items() if v is not None}
    if source.text_config:
        text = {**config[source.text_config], **changed}
        return {**config, source.text_config: text, "model_type": source.model_type}
    return {**config, **changed, "model_type": source.model_type}


# Conditions


@pytest.mark.parametrize(
    ("condition", "value", "refused"),
    [
        (Condition("a", "why", values=(False, None)), False, False),
        (Condition("a", "why", values=(False, None)), None, False),
        (Condition("a", "why", values=(False, None)), True, True),
        (Condition("a", "why", values=(1.0,)), 1, False),
        (Condition("a", "why", values=(1.0,)), 2, True),
        (Condition("a", "why", each="x"), ["x", "x"], False),
        (Condition("a", "why", each="x"), [], False),
        (Condition("a", "why", each="x"), None, False),
        (Condition("a", "why", each="x"), ["x", "y"], True),
    ],
)
def test_conditions(condition: Condition, value: Any, refused: bool) -> None:
    said = condition.refusal(value)
    assert (said is not None) is refused
    assert said is None or (said.startswith("a") and said.endswith(": why"))


def test_a_list_names_only_what_is_wrong() -> None:
    condition = Condition("layer_types", "windows", each="full")
    assert condition.refusal(["full", "b", "a", "b"]) == "layer_types holds a, b: windows"


@pytest.mark.parametrize("pair", PLAIN, ids=lambda p: f"{p.source}-{p.target}")
def test_every_condition_refuses_something(pair: Pair) -> None:
    """With the harmless values the pair is open; with any other value of one field it is not."""
    source, _ = both(pair)
    harmless = {c.field: c.values[0] for c in pair.require if c.values is not None}
    harmless |= {c.field: [c.each] for c in pair.require if c.values is None}
    plain = config_of(source, **harmless, partial_rotary_factor=1.0, rope_parameters={})
    assert pair.refusals(source, plain) == []
    for condition in pair.require:
        value: Any = "surprise" if condition.values is not None else ["surprise"]
        text = {**harmless, condition.field: value, "partial_rotary_factor": 1.0}
        (said,) = pair.refusals(source, config_of(source, **text, rope_parameters={}))
        assert condition.field in said and condition.because in said


def test_partial_rotation_is_refused_where_the_target_rotates_whole_heads() -> None:
    pair = named("stablelm", "phimoe")
    source = Layout.load("stablelm")
    config = config_of(source, partial_rotary_factor=0.25)
    assert any("partial_rotary_factor=0.25" in s for s in pair.refusals(source, config))


# Configs


@pytest.mark.parametrize("pair", PLAIN, ids=lambda p: f"{p.source}-{p.target}")
def test_a_mapped_config_is_the_targets(pair: Pair) -> None:
    source, target = both(pair)
    made = map_config(pair, source, target, config_of(source), {"surprise": 7})
    assert made.value["model_type"] == target.model_type
    assert made.value["architectures"] == [target.cls]
    text = made.value[target.text_config] if target.text_config else made.value
    assert text["surprise"] == 7, "what was decided wins"
    assert {k: text[k] for k in pair.set if k != "surprise"} == pair.set
    assert all(text[k] == v for k, v in target.overlay.fixed.items() if k not in pair.set)
    assert not set(made.dropped) & set(text) - {"model_type", "architectures"}
    assert all(len(why) > 5 for why in made.dropped.values())
    for old, new in pair.rename.items():
        assert new in text and old not in text


@pytest.mark.parametrize("pair", PLAIN, ids=lambda p: f"{p.source}-{p.target}")
def test_fields_that_nobody_knows_travel(pair: Pair) -> None:
    """A user's own field says nothing about the function; it is kept as it is."""
    source, target = both(pair)
    made = map_config(pair, source, target, config_of(source, my_note="x"), {})
    text = made.value[target.text_config] if target.text_config else made.value
    assert text["my_note"] == "x"


def test_a_field_without_a_rule_is_an_error() -> None:
    pair = dataclasses.replace(named("llama", "mixtral"), drop={})
    source, target = both(pair)
    with pytest.raises(MoetoolError, match="a config field has no rule") as refused:
        map_config(pair, source, target, config_of(source, pretraining_tp=2), {})
    assert "pretraining_tp=2" in str(refused.value)
    assert "archs/pairs/llama--mixtral.json" in str(refused.value)


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_a_quantized_source_is_refused(field: str) -> None:
    pair = named("llama", "mixtral")
    source, target = both(pair)
    with pytest.raises(MoetoolError, match="quantized"):
        map_config(pair, source, target, {**config_of(source), field: {"bits": 4}}, {})


def test_decided_fields_win_over_the_pair() -> None:
    pair = named("llama", "qwen2_moe")
    source, target = both(pair)
    name = next(iter(pair.set))
    assert map_config(pair, source, target, config_of(source), {name: "mine"}).value[name] == "mine"


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, {"rope_theta": 10000.0, "rope_type": "default"}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
            {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0},
        ),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, {"full": {"rope_theta": 1.0}}),
    ],
)
def test_rotary_settings_in_both_spellings(given: dict[str, Any], settings: dict[str, Any]) -> None:
    source = Layout.load("llama")
    found = rope(source, {"model_type": "llama", **given})
    assert {k: found[k] for k in settings} == settings
    pair, target = named("llama", "mixtral"), Layout.load("mixtral")
    made = map_config(pair, source, target, {"model_type": "llama", **given}, {}).value
    assert made["rope_parameters"] == found
    assert "rope_theta" not in made and "rope_scaling" not in made  # surgery/spellings.py adds them


# Tensors


@pytest.mark.parametrize("pair", PLAIN, ids=lambda p: f"{p.source}-{p.target}")
def test_every_trunk_tensor_has_one_place(pair: Pair) -> None:
    """No tensor of the source is lost, no tensor of the target is made twice, and all that the
    target needs beside experts and routers is there.
    """
    source, target = both(pair)
    text = source.text(config_of(source))
    made: dict[str, list[tuple[int, int] | None]] = {}
    for slot in source.tensors:
        if str(slot.role).startswith("ffn.") or slot.when is not None:
            continue
        name = slot.name.replace("{layer}", "5").replace("{i0}", "2")
        if name.partition(".")[0] in ("", "{") or "{" in name:
            continue
        for mapped in map_tensor(pair, source, target, name, text):
            made.setdefault(mapped.name, []).append(mapped.rows)
            found = target.match(mapped.name)
            assert found is not None and found.layer in (5, None), mapped.name
    assert len(made) > 5
    for name, spans in made.items():
        cut = all(span is not None for span in spans)
        # an embedding is the head as well where they are tied
        assert len(spans) == 1 or cut or name in source.tied, f"{name} is made twice"
    needed = {
        s.name.replace("{layer}", "5")
        for s in target.tensors
        if s.role is None and s.when is None and s.layers in ("all", None) and "{i" not in s.name
    }
    absent = {n for n in needed - set(made) if n not in target.tied}
    assert not {n for n in absent if target.in_text(target.match(n).slot)}  # type: ignore[union-attr]


def test_a_name_that_the_family_does_not_know_is_an_error() -> None:
    pair = named("llama", "mixtral")
    source, target = both(pair)
    with pytest.raises(MoetoolError, match="unknown to its family") as refused:
        [*map_tensor(pair, source, target, "model.lora_A.weight", {})]
    assert "drops nothing silently" in refused.value.hint


def test_a_tensor_without_a_place_is_an_error() -> None:
    pair = Pair("qwen3", "mixtral")
    source, target = both(pair)
    with pytest.raises(MoetoolError, match="no place in the target") as refused:
        [*map_tensor(pair, source, target, "model.layers.0.self_attn.q_norm.weight", {})]
    assert "archs show qwen3" in refused.value.hint


def test_rows_and_parameters_are_formulas() -> None:
    pair, text = named("phi3", "mixtral"), {"num_attention_heads": 4, "num_key_value_heads": 2}
    source, target = both(pair)
    text |= {"hidden_size": 64, "head_dim": 16}
    name = "model.layers.3.self_attn.qkv_proj.weight"
    spans = {m.name[-13:-7]: m.rows for m in map_tensor(pair, source, target, name, text)}
    assert sorted(spans.values()) == [(0, 64), (64, 96), (96, 128)]  # type: ignore[type-var]
    folded = named("gemma", "mixtral")
    source, target = both(folded)
    made = map_tensor(folded, source, target, "model.embed_tokens.weight", text)
    (mapped,) = (m for m in made if m.name.startswith("model."))
    assert mapped.op != "copy" and sqrt(64) in mapped.params.values()


# The files


def test_evidence_names_a_test_that_is_there() -> None:
    """No file of ours is named to a user, only the test that shows it."""
    code = (ROOT / "tests" / "every" / "test_targets.py").read_text()
    assert "def test_function_is_kept(" in code
    for pair in pairs():
        assert pair.evidence == f"test_function_is_kept[{pair.source}-{pair.target}]"
        assert not pair.measured or pair.measured.startswith("max|dlogit| ")
        assert "/" not in pair.evidence and ".md" not in pair.evidence + pair.measured


@pytest.mark.parametrize(
    "change", [{"surprise": 1}, {"require": [{"field": "a", "because": "b", "surprise": 1}]}]
)
def test_an_unknown_key_is_an_error(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs").mkdir()
    data = json.loads((DATA / "pairs" / "llama--mixtral.json").read_text())
    (tmp_path / "pairs" / "llama--mixtral.json").write_text(json.dumps({**data, **change}))
    monkeypatch.setattr(pairing, "DATA", tmp_path)
    pairs.cache_clear()
    try:
        with pytest.raises(MoetoolError, match="not well formed") as refused:
            pairs()
    finally:
        pairs.cache_clear()
    assert "llama--mixtral.json" in str(refused.value)


def test_pairs_come_in_the_order_of_preference() -> None:
    order = [(p.source, p.preferred, p.target) for p in pairs()]
    assert order == sorted(order) and len(set(order)) == len(order)
