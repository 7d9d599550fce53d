"""A written config says the same to every reader, and to transformers 5 what the source's said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from moetool.errors import MoetoolError
from moetool.surgery.layout import Layout, kinds
from moetool.surgery.spellings import completed

DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
# Under yarn their classes ask for more, or for another type.
NO_YARN = {"mlcd", "mlcd_vision_model", "sam3_tracker_video", "sam3_vit_model"}  # no length
NO_YARN |= {"phi3", "phi4_multimodal", "phimoe", "pixtral", "recurrent_gemma"}
# Their defaults do not pass their own checks when they are read back.
ODD = {"bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h"}


def llama(**said: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": 64, **said}


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {}),
        ({"rope_theta": 1e6}, {}),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "su", "factor": 2.0}}, {}),
        ({"rope_parameters": DEFAULT}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_parameters": YARN | {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
            {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "rope_scaling": YARN},
        ),
        ({"rope_parameters": MROPE}, {"rope_scaling": MROPE}),
        ({"rope_parameters": YARN, "rope_scaling": None}, {"rope_scaling": YARN}),
        ({"rope_parameters": DEFAULT, "rope_theta": 5e5, "rope_scaling": None}, {}),
        ({"rope_parameters": DEFAULT, "rope_theta": 500000}, {"rope_scaling": None}),
        ({"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT}}, {}),
        (
            {"rope_parameters": DEFAULT, "rope_scaling": {"type": "mrope"}},
            {"rope_theta": 5e5},
        ),
    ],
)
def test_rotary_settings(given: dict[str, Any], added: dict[str, Any]) -> None:
    """What is there stays, in its place; what is missing is added once."""
    config = llama(**given)
    made = completed(config)
    assert made == config | added and list(made)[: len(config)] == list(config)
    assert (made is config) == (not added)
    assert completed(made) is made


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"rope_theta": 1e4}, "rope_theta=500000.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=1.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='default'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type='default'"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], word: str) -> None:
    said = {"rope_parameters": DEFAULT | {"partial_rotary_factor": 1.0}}
    with pytest.raises(MoetoolError, match="two things") as refused:
        completed(llama(**said, **given))
    assert word in str(refused.value) and refused.value.hint


def test_kinds_of_layers_have_older_names_too() -> None:
    """Under them the first kind alone can be scaled; where they cannot say it, nothing is said."""
    full, local = ({"rope_type": "default", "rope_theta": base} for base in (1e5, 2e4))

    def gemma(first: Any, second: Any, **more: Any) -> dict[str, Any]:
        own = {"full_attention": first, "sliding_attention": second}
        return {"model_type": "gemma3_text", "rope_parameters": own, **more}

    bases = {"rope_theta": 1e5, "rope_local_base_freq": 2e4}
    plain, scaled = gemma(full, local), gemma(full | YARN, local)
    assert completed(plain) == plain | bases | {"rope_scaling": None}
    assert completed(scaled) == scaled | bases | {"rope_scaling": YARN | {"rope_type": "yarn"}}
    outer = {"model_type": "gemma3", "text_config": scaled}
    assert completed(outer) == {"model_type": "gemma3", "text_config": completed(scaled)}
    for unsaid in (gemma(full, local | YARN), gemma(full | {"partial_rotary_factor": 0.5}, local)):
        assert completed(unsaid) is unsaid
    assert completed(half := gemma(full, None)) is half
    for name, base in (("rope_local_base_freq", 1e4), ("rope_theta", 1e6)):
        with pytest.raises(MoetoolError, match="two things"):
            completed(gemma(full, local, **{name: base}))


def test_the_text_part_is_completed_where_it_lies() -> None:
    inner = {"model_type": "qwen3_vl_moe_text", "rope_parameters": MROPE | {"rope_theta": 5e6}}
    config = {"model_type": "qwen3_vl_moe", "text_config": inner, "vision_config": {"depth": 2}}
    made = completed(config)
    asked = {"norm_topk_prob": True, "tie_word_embeddings": False, "num_experts": 60}
    rotary = {"rope_theta": 5e6, "rope_scaling": MROPE}
    assert made == config | {"text_config": inner | rotary | asked}
    tied = completed(config | {"tie_word_embeddings": True})["text_config"]
    assert tied["tie_word_embeddings"] is True
    assert list(made) == list(config) and "rope_theta" not in made


def test_what_a_familys_readers_ask_for() -> None:
    """Constants and formulas from archs/overlay.json, under what the config says itself."""
    said = {"hidden_size": 64, "num_attention_heads": 4}
    made = completed({"model_type": "glm4_moe", "head_dim": None, **said})
    assert (made["head_dim"], made["scoring_func"]) == (16, "sigmoid")
    kept = {"model_type": "glm4_moe", "head_dim": 24, "topk_method": "own", "scoring_func": "own"}
    assert completed(kept | said) == kept | said
    pruned = completed({"model_type": "qwen3_moe", "num_local_experts": 6, **said})
    assert (pruned["num_experts"], pruned["head_dim"]) == (6, 16)
    hub = {"model_type": "qwen3_moe", "num_experts": 6, "head_dim": 16, **said}
    assert completed(hub) is hub


def configs(family: str) -> Iterator[dict[str, Any]]:
    """A family's config as its class writes it: with default rotary settings, and with yarn."""
    from transformers import CONFIG_MAPPING

    plain = CONFIG_MAPPING[family]().to_json_string(use_diff=False)
    yield json.loads(plain)
    text = inside(scaled := json.loads(plain), family)
    own = text.get("rope_parameters")
    flat = isinstance(own, dict) and not any(isinstance(v, dict) for v in own.values())
    if flat and family not in NO_YARN:
        text["rope_parameters"] = own | YARN
        yield scaled


def inside(config: dict[str, Any], family: str) -> dict[str, Any]:
    for part in filter(None, Layout.load(family).text_config.split(".")):
        config = config.get(part) or {}
    return config


def test_transformers_reads_the_same_from_every_family() -> None:
    from transformers import CONFIG_MAPPING

    changed = 0
    for family in sorted(set(kinds()) - ODD):
        for config in configs(family):
            made = completed(config)
            changed += made is not config
            read = [
                json.loads(CONFIG_MAPPING[family].from_dict(c).to_json_string(use_diff=False))
                for c in json.loads(json.dumps([config, made]))
            ]
            texts = [inside(r, family) for r in read]
            for name, value in texts[0].items():
                assert name == "rope_scaling" or texts[1][name] == value, (family, name)
            whole = ({k: v for k, v in r.items() if not isinstance(v, dict)} for r in read)
            first, second = whole
            assert {k: second[k] for k in first if k != "rope_scaling"} == {
                k: v for k, v in first.items() if k != "rope_scaling"
            }, family
    assert changed > 200
