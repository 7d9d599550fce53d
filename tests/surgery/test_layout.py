"""The finder of the text model over all families; layouts are strict down to their last part."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moetool
from moetool.errors import MoetoolError
from moetool.surgery import layout as layouts
from moetool.surgery.family import (
    Names,
    Overlay,
    RouterLaw,
    SharedExpert,
    Slot,
    StackedExperts,
    filled,
)
from moetool.surgery.layout import DATA, Layout, families, is_dead, words
from moetool.surgery.pair import Condition, Pair, Piecewise, pairs
from moetool.surgery.text_model import any_text_model, text_model

PACKAGE = Path(moetool.__file__).parent
ALL = [n for kind in ("moe", "dense") for n in families()[kind]]
MOE, DENSE = families()["moe"], families()["dense"]
# of dense families, of which there are many alike, every fourth by default
SOME = [pytest.param(n, marks=[pytest.mark.slow] if i % 4 else []) for i, n in enumerate(DENSE)]
SOME += MOE
OVERLAY = json.loads((DATA / "overlay.json").read_text())
RAW = {n: json.loads((DATA / "families" / f"{n}.json").read_text()) for n in ALL}


def config_of(name: str, **text: Any) -> dict[str, Any]:
    """The smallest config of a family: its type, and that of its text part where it has one."""
    layout = Layout.load(name)
    config: dict[str, Any] = text
    for part in reversed([p for p in layout.text_config.split(".") if p]):
        config = {part: config}
    return {"model_type": name, **config}


@pytest.mark.parametrize("name", SOME)
def test_the_text_model_knows_the_names_of_its_layers(name: str) -> None:
    """Whatever describes the text model, it recognises every tensor in the layers of the whole
    family, in the same layer and in the same role.
    """
    layout, at = Layout.load(name), text_model(config_of(name))
    for slot in layout.tensors:
        if "{layer}" not in slot.name:
            continue
        found = at.match(filled(re.sub(r"\{i\d+\}", "0", slot.name), layer=7, expert=5))
        assert found is not None, slot.name
        assert found.layer == 7, slot.name
        assert found.expert == (5 if "{expert}" in slot.name else None)
        assert found.slot.role == slot.role
    if at.layout is not layout:
        assert layout.stem == at.prefix + at.layout.stem


@pytest.mark.parametrize("name", SOME)
def test_towers_have_no_layers_of_the_text_model(name: str) -> None:
    """Numbers outside the stack are not called layers; every tensor in layers is under one stem,
    but for those that a class files elsewhere on disk.
    """
    layout = Layout.load(name)
    if layout.stack is None:
        return
    elsewhere = [s.name for s in layout.tensors if "{i0}" in s.name and "{layer}" not in s.name]
    assert all(not n.startswith(layout.stem) for n in elsewhere)
    inside = [s for s in layout.tensors if s.name.startswith(layout.stem)]
    assert inside and all(s.layers is not None and "{layer}" in s.name for s in inside)
    assert not [s for s in layout.tensors if "{i0}" in s.name and s.role]
    assert all(layout.in_text(s) for s in inside)
    assert not any(layout.in_text(s) for s in layout.tensors if s.name in elsewhere)


def test_which_families_wrap_a_model_of_another() -> None:
    found = {n: text_model(config_of(n)) for n in ALL}
    wraps = {n: (at.layout.model_type, at.prefix) for n, at in found.items() if at.prefix}
    assert wraps == {
        "audioflamingo3": ("qwen2", "language_model."),
        "aya_vision": ("cohere2", "language_model."),
        "blip-2": ("opt", "language_model."),
        "fuyu": ("persimmon", "language_model."),
        "gemma3": ("gemma3_text", "language_model."),
        "glmasr": ("llama", "language_model."),
        "got_ocr2": ("qwen2", "language_model."),
        "granite_speech": ("granite", "language_model."),
        "granite_speech_plus": ("granite", "language_model."),
        "instructblip": ("opt", "language_model."),
        "instructblipvideo": ("opt", "language_model."),
        "internvl": ("qwen2", "language_model."),
        "llava": ("llama", "language_model."),
        "llava_next": ("llama", "language_model."),
        "llava_next_video": ("llama", "language_model."),
        "llava_onevision": ("qwen2", "language_model."),
        "mistral3": ("mistral", "language_model."),
        "musicflamingo": ("qwen2", "language_model."),
        "paligemma": ("gemma", "language_model."),
        "pp_chart2table": ("qwen2", "language_model."),
        "qwen2_audio": ("qwen2", "language_model."),
        "vibevoice_asr": ("qwen2", "language_model."),
        "video_llava": ("llama", "language_model."),
        "vipllava": ("llama", "language_model."),
        "voxtral": ("llama", "language_model."),
    }
    assert all(at.layout.model_type == n for n, at in found.items() if n not in wraps)


def test_the_inner_family_is_the_configs_own() -> None:
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "mixtral", "num_local_experts": 3, "num_hidden_layers": 2},
    }
    at = text_model(config)
    assert at.layout.model_type == "mixtral" and at.path == ("text_config",)
    assert at.field("experts") == 3 and at.moe_layers() == [0, 1]
    name = "language_model.model.layers.1.block_sparse_moe.experts.2.w1.weight"
    found = at.match(name)
    assert found and (found.layer, found.expert, found.slot.role) == (1, 2, "expert.gate")
    assert at.inner(name) == name.removeprefix("language_model.")
    assert at.inner("vision_tower.x") is None and at.match("vision_tower.x") is None
    assert at.name("model.layers.{layer}.x.{expert}", layer=1, expert=0) == (
        "language_model.model.layers.1.x.0"
    )
    assert at.text["num_key_value_heads"] == 8  # the class's default


def test_a_family_with_experts_of_its_own_speaks_for_itself() -> None:
    for name in ("llama4", "qwen3_vl_moe", "qwen3_omni_moe"):
        at = text_model(config_of(name))
        assert at.layout.model_type == name and at.prefix == ""
        assert at.path == tuple(at.layout.text_config.split("."))


def test_an_unknown_inner_family_leaves_the_outer_one() -> None:
    at = text_model({"model_type": "llava", "text_config": {"model_type": "surprise"}})
    assert at.layout.model_type == "llava" and at.path == ("text_config",)


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("", ["model.norm.weight"]),
        ("thing.", ["a.b", "thing.model.layers.0.mlp.up_proj.weight"]),
        ("a.b.c.", ["a.b.c.lm_head.weight"]),
        ("", ["nothing.known"]),
    ],
)
def test_any_text_model(prefix: str, names: list[str]) -> None:
    """Of an unknown family the text part is known, under the prefix that the names have."""
    config = {"model_type": "surprise", "text_config": {"model_type": "llama", "hidden_size": 64}}
    at = any_text_model(config, names)
    assert at is not None and (at.layout.model_type, at.prefix) == ("llama", prefix)
    assert at.field("hidden") == 64
    assert any_text_model({"model_type": "surprise"}, names) is None
    assert any_text_model({}, names) is None
    known = any_text_model({"model_type": "llama"}, [])
    assert known and known.layout.model_type == "llama"


@pytest.mark.parametrize("name", MOE)
def test_stacked_names_are_recognised(name: str) -> None:
    layout, at = Layout.load(name), text_model(config_of(name))
    fused = layout.fused()
    assert set(fused) in (set(), {"gate_up", "down"})
    for role, template in fused.items():
        found = at.match(filled(template, layer=3))
        assert found and found.layer == 3 and found.expert is None
        assert found.slot.role == f"expert.{role}"
        assert template.count("{") == 1
    if layout.stack and layout.experts.stacked:
        head = layout.stack + ".{layer}."
        assert all(t.startswith(head) for t in layout.experts.stacked.values())
        assert layout.experts.block is not None


@pytest.mark.parametrize("name", SOME)
def test_slots_match_themselves(name: str) -> None:
    """Every name that a checkpoint must hold is one that the layout recognises, and none twice."""
    sizes = {"layers": 3, "hidden": 32, "heads": 4, "kv_heads": 2, "experts": 2, "width": 48}
    layout = Layout.load(name)
    config = config_of(name, **{f: sizes[m] for m, f in layout.fields.items() if m in sizes})
    needed = [*layout.slots(config)]
    assert len({n.name for n in needed}) == len(needed) > 0
    for tensor in needed:
        found = layout.match(tensor.name)
        assert found is not None and found.slot == tensor.slot, tensor.name
        assert "{" not in tensor.name and tensor.slot.layers != "some"
        if tensor.shape is not None and tensor.slot.shape is not None:
            assert len(tensor.shape) == len(tensor.slot.shape)


@pytest.mark.parametrize(
    ("name", "layer", "expert"),
    [
        ("model.layers.7.block_sparse_moe.experts.11.w3.weight", 7, 11),
        ("model.layers.70.input_layernorm.weight", 70, None),
        ("lm_head.weight", None, None),
    ],
)
def test_numbers(name: str, layer: int | None, expert: int | None) -> None:
    found = Layout.load("mixtral").match(name)
    assert found and (found.layer, found.expert) == (layer, expert)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.x.input_layernorm.weight",
        "model.layers.7a.input_layernorm.weight",
        "model.layers.7.input_layernorm",
        "layers.7.input_layernorm.weight",
        "model.layers.7.block_sparse_moe.experts.w3.weight",
        "",
    ],
)
def test_names_that_only_look_alike(name: str) -> None:
    assert Layout.load("mixtral").match(name) is None
    assert text_model({"model_type": "mixtral"}).match(name) is None


def test_words_of_every_family() -> None:
    assert is_dead("model.layers.0.self_attn.rotary_emb.inv_freq") and is_dead("h.0.masked_bias")
    assert not is_dead("rotary_emb.inv_freq.weight") and not is_dead("model.norm.weight")
    assert words().in_mtp("mtp.layers.0.mlp.gate.weight") == "0.mlp.gate.weight"
    assert words().in_mtp("model.mtp.layers.11.x") == "11.x"
    for name in ("mtp.norm.weight", "mtp.layers.x.y", "model.layers.0.mtp.layers.0.x", "x"):
        assert words().in_mtp(name) is None
    assert words().is_first("model.embed_tokens.weight") and not words().is_first("lm_head.weight")


# Strictness: unknown keys are errors at every depth, and every key that is there is read.


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"experts": {"surprise": 1}},
        {"tensors": [{"name": "a", "shape": None, "surprise": 1}]},
        {"tensors": [{"shape": None}]},
    ],
)
def test_an_unknown_key_in_a_family_is_an_error(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict(tmp_path, monkeypatch, {**RAW["mixtral"], **change}, OVERLAY["mixtral"])


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"law": {"score": "softmax", "surprise": 1}},
        {"shared": {"surprise": 1}},
        {"sites": {"surprise": 1}},
        {"sites": {"dense_prefix": "a", "surprise": 1}},
        {"extra_layers": "x"},
        {"layouts": ["fused"]},
    ],
)
def test_an_unknown_key_in_the_overlay_is_an_error(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict(tmp_path, monkeypatch, RAW["mixtral"], {**OVERLAY["mixtral"], **change})


def strict(
    folder: Path, patch: pytest.MonkeyPatch, family: dict[str, Any], overlay: dict[str, Any]
) -> None:
    """Loading this data is refused, with the file and what to do."""
    (folder / "families").mkdir()
    (folder / "families" / "mine.json").write_text(json.dumps({**family, "model_type": "mine"}))
    (folder / "overlay.json").write_text(json.dumps({"mine": overlay}))
    (folder / "index.json").write_text('{"moe": {}, "dense": {}}')
    patch.setattr(layouts, "DATA", folder)
    layouts._load.cache_clear()
    try:
        with pytest.raises(MoetoolError, match="not well formed") as refused:
            Layout.load("mine")
    finally:
        layouts._load.cache_clear()
    assert "mine.json" in str(refused.value) and "overlay.json" in refused.value.hint


def test_unknown_words_are_errors() -> None:
    with pytest.raises(TypeError):
        Names.read('{"dead": [], "mtp": [], "first": [], "surprise": []}')
    with pytest.raises(TypeError):
        Names.read('{"dead": []}')
    with pytest.raises(TypeError):
        Condition.read({"field": "a", "because": "b", "surprise": 1})


def attributes() -> set[str]:
    """Every attribute that the package reads, of anything."""
    return {
        node.attr
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


DATACLASSES: list[Any] = [
    Layout,
    Slot,
    StackedExperts,
    Overlay,
    RouterLaw,
    SharedExpert,
    Names,
    Pair,
    Piecewise,
    Condition,
]


@pytest.mark.parametrize("part", DATACLASSES, ids=lambda c: c.__name__)
def test_every_key_is_read(part: Any) -> None:
    """A key of the data that no code asks for would be a promise nobody keeps."""
    assert {f.name for f in dataclasses.fields(part)} <= attributes()


def used() -> Iterator[tuple[str, set[str]]]:
    """(part, keys) of all data files together."""
    yield "Layout", set().union(*RAW.values())
    yield "StackedExperts", set().union(*(d.get("experts", {}) for d in RAW.values()))
    yield "Slot", set().union(*(t for d in RAW.values() for t in d["tensors"]))
    yield "Overlay", set().union(*OVERLAY.values())
    for part, key in (("RouterLaw", "law"), ("SharedExpert", "shared")):
        yield part, set().union(*(d.get(key, {}) for d in OVERLAY.values()))
    files = [json.loads(p.read_text()) for p in (DATA / "pairs").glob("*.json")]
    yield "Pair", set().union(*files)


@pytest.mark.parametrize(("part", "keys"), [*used()], ids=lambda v: v if isinstance(v, str) else "")
def test_every_field_is_used(part: str, keys: set[str]) -> None:
    """And a field that no file has would be code for nothing."""
    cls = next(c for c in DATACLASSES if c.__name__ == part)
    beside = {"overlay", "base"} if part == "Layout" else set()  # laid over, grown
    assert {f.name for f in dataclasses.fields(cls)} - beside == keys


@pytest.mark.parametrize("name", MOE)
def test_the_law_is_shown_as_it_stands(name: str) -> None:
    assert Layout.load(name).overlay.law.as_json() == OVERLAY[name]["law"]


def test_families_without_a_law_show_none() -> None:
    assert RouterLaw().as_json() == {}
    assert all(Layout.load(n).overlay.law == RouterLaw() for n in DENSE)


# No family's name stands in code: what differs between families is data.


def strings() -> Iterator[tuple[Path, int, str]]:
    """Every string of the package that is no docstring, message or help text (those have blanks)."""
    for path in PACKAGE.rglob("*.py"):
        if path.parts[len(PACKAGE.parts)] == "demo":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            word = node.value if isinstance(node, ast.Constant) else None
            if isinstance(word, str) and len(word.split()) == 1:
                yield path, node.lineno, word


# Words that are families' names and words of their own: a form, a kind of layer or of
# tokenizer, a part of a path.
# "bitnet" is a quant_method too.
ORDINARY = {"gpt2", "llama", "beam", "opt", "clip", "falcon", "mpt", "bert", "bitnet"}


def test_no_family_stands_in_code() -> None:
    names = set(ALL) - ORDINARY
    found = [(p.name, n, s) for p, n, s in strings() if s in names]
    assert not found


def test_no_class_of_transformers_stands_in_code() -> None:
    classes = {RAW[n]["cls"] for n in ALL}
    assert not [(p.name, n, s) for p, n, s in strings() if s in classes]
    assert not [s for _, _, s in strings() if re.fullmatch(r"[A-Z]\w+(Experts|MoE|Moe|MLP)", s)]


def test_near_misses_and_pairs_are_read() -> None:
    assert len(pairs()) == len([*(DATA / "pairs").glob("*.json")])
    for pair in pairs():
        assert pair.source in ALL and pair.target in ALL
        for condition in pair.require:
            assert (condition.values is None) or condition.values
            assert condition.values is not None or condition.each is not None
            assert len(condition.because) > 10
