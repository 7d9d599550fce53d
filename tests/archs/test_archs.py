"""Layouts are what the installed transformers says, strict, and enough to make a checkpoint from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moetool.archs import generate
from moetool.errors import MoetoolError
from moetool.surgery.layout import DATA, Layout, Overlay, families
from moetool.surgery.pair import map_config, pairs

ALL = [(kind, name) for kind, names in families().items() for name in names]


# whose linears are transposed
TURNED = {"gpt2", "decision_transformer", "imagegpt", "openai-gpt"}


def test_counts() -> None:
    assert len(families()["moe"]) == 82 and len(families()["dense"]) == 321
    assert len(list((DATA / "families").glob("*.json"))) == 403
    overlay = json.loads((DATA / "overlay.json").read_text())
    adjusting = {name for name, said in overlay.items() if "adjusts_width" in said}
    turned = {name for name, said in overlay.items() if "linears" in said}
    adding = {name for name, said in overlay.items() if "adds_residual" in said}
    missing = {
        "cohere2",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
    }  # what its readers ask for
    assert set(overlay) == set(families()["moe"]) | adjusting | turned | adding | missing
    assert adjusting == {"lfm2", "lfm2_vl"} and turned == TURNED and adding == {"bloom", "mpt"}


@pytest.mark.parametrize(
    "names",
    [
        ["deepseek_v3", "gpt_oss", "granitemoe", "llama", "llava", "mixtral", "qwen3_vl_moe", "t5"],
        [],
    ],
    ids=["few", "all"],
)
def test_generated_files_are_current(names: list[str]) -> None:
    """Derive families (none named: all) again from the installed transformers and compare byte
    for byte.
    """
    import transformers

    if transformers.__version__ != json.loads((DATA / "index.json").read_text())["transformers"]:
        pytest.fail(
            f"layouts were generated with another transformers than {transformers.__version__}: python -m moetool.archs.generate, and look at the diff"
        )
    assert generate.main(["--check", *names]) == 0


@pytest.mark.parametrize("name", [n for _, n in ALL])
def test_layout_loads_strictly(name: str) -> None:
    layout = Layout.load(name)
    assert layout.model_type == name and layout.tensors
    if layout.kind == "moe":
        assert layout.overlay.law.score
        assert any(str(s.role).startswith("expert.") for s in layout.tensors) or name in (
            "doge",
            "vitpose_backbone",
        )


def test_a_patch_is_not_as_wide_as_a_head() -> None:
    """CLIP's patches of 14 or 32 pixels, beside heads of 64."""
    every = [slot for _, name in ALL for slot in Layout.load(name).tensors]
    assert len(every) > 5000
    assert not [s.name for s in every if "head_dim" in (s.shape or ()) and "{layer}" not in s.name]


def test_unknown_key_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moetool.surgery import layout

    (tmp_path / "families").mkdir()
    data = json.loads((DATA / "families" / "llama.json").read_text())
    (tmp_path / "families" / "llama2.json").write_text(json.dumps({**data, "surprise": 1}))
    (tmp_path / "overlay.json").write_text("{}")
    (tmp_path / "index.json").write_text('{"moe": {}, "dense": {}}')
    monkeypatch.setattr(layout, "DATA", tmp_path)
    with pytest.raises(MoetoolError, match="surprise"):
        layout._load("llama2")
    with pytest.raises(TypeError):
        Overlay(surprise=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["lama", "../llama", "", "qwen3-moe"])
def test_unknown_family(name: str) -> None:
    with pytest.raises(MoetoolError, match="no layout"):
        Layout.load(name)


def test_of_every_type_of_transformers_there_is_data_or_a_reason() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    why = json.loads((DATA / "absent.json").read_text())
    absent = [name for names in why.values() for name in names]
    known = [n for names in families().values() for n in names]
    assert sorted([*absent, *known]) == sorted(CONFIG_MAPPING_NAMES)
    with pytest.raises(MoetoolError, match="no layout") as raised:
        Layout.load("gemma3n")
    assert raised.value.hint.startswith("transformers has gemma3n, and its class cannot be built")


def test_near_misses_speak_of_families_that_exist() -> None:
    from moetool.methods.upcycle.targets import why_not

    near = json.loads((DATA / "near_misses.json").read_text())
    known = {n for names in families().values() for n in names}
    assert len(near) >= 20 and all({name, *targets} <= known for name, targets in near.items())
    assert not {p.source for p in pairs()} & set(near)
    assert why_not(Layout.load("exaone4")).startswith("not exaone_moe: norm placement")
    assert "already has experts" in why_not(
        Layout.load("mixtral")
    ) and "no class in transformers" in why_not(Layout.load("codegen"))


@pytest.mark.parametrize(
    ("name", "template", "layer", "expert"),
    [
        (
            "model.layers.12.block_sparse_moe.experts.7.w2.weight",
            "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
            12,
            7,
        ),
        ("model.norm.weight", "model.norm.weight", None, None),
    ],
)
def test_match(name: str, template: str, layer: int | None, expert: int | None) -> None:
    found = Layout.load("mixtral").match(name)
    assert found and (found.slot.name, found.layer, found.expert) == (template, layer, expert)
    assert Layout.load("mixtral").match(name + "x") is None


def test_fused_and_per_expert_forms() -> None:
    assert set(Layout.load("mixtral").fused()) == {"gate_up", "down"} and set(
        Layout.load("mixtral").per_expert()
    ) == {"gate", "up", "down"}
    assert (
        not Layout.load("gpt_oss").fused() and not Layout.load("llama4").fused()
    )  # interleaved; transposed
    assert (
        Layout.load("granitemoe").fused()["gate_up"].endswith("input_linear.weight")
        and not Layout.load("granitemoe").per_expert()
    )


@pytest.mark.parametrize("pair", pairs(), ids=lambda p: f"{p.source}-{p.target}")
def test_every_config_field_has_a_rule(pair: Any) -> None:
    """A config with every field of the source's class maps without a field that nobody speaks of."""
    if pair.inner:
        return
    source, target = Layout.load(pair.source), Layout.load(pair.target)
    config = {k: v for k, v in source.defaults.items() if v is not None} | {
        "model_type": pair.source
    }
    made = map_config(pair, source, target, config, {})
    inner = made.value[target.text_config] if target.text_config else made.value
    given = config[source.text_config] if source.text_config else config
    rope = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "model_type"}
    lost = (
        set(given) - set(inner) - set(made.dropped) - rope - set(pair.rename) - set(source.aliases)
    )
    assert not lost
    assert all(made.dropped.values())


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "qwen3_moe",
        "glm4_moe",
        "deepseek_v3",
        "olmoe",
        "gpt_oss",
        "llama4_text",
        "minimax_m2",
        "granitemoe",
        "jamba",
        "llama",
        "qwen2",
        "gemma",
    ],
)
def test_slots_are_what_transformers_wants(name: str) -> None:
    """Names and shapes from the layout alone equal those of a model built by transformers."""
    import torch
    import transformers

    layout = Layout.load(name)
    wished = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 8,
        "num_local_experts": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    config = transformers.CONFIG_MAPPING[name](
        **{k: v for k, v in wished.items() if k in layout.defaults}
    )
    with torch.device("meta"):
        model = getattr(transformers, layout.cls)._from_config(config)
    from transformers.core_model_loading import revert_weight_conversion

    truth = {
        n: tuple(t.shape) for n, t in revert_weight_conversion(model, model.state_dict()).items()
    }
    mine = {n: s for n, s, _ in layout.slots(json.loads(config.to_json_string(use_diff=False)))}
    partial = {n for n in truth if (f := layout.match(n)) and f.slot.layers == "some"}
    assert {n for n in truth if layout.match(n) is None} == set()
    tied = set(layout.tied) if getattr(config, "tie_word_embeddings", False) else set()
    assert set(mine) | partial == set(truth) - tied
    assert all(s is None or None in s or s == truth[n] for n, s in mine.items())
