"""Weights that are no numbers, experts that the config has no place for, and files of ours that
somebody edited: a sentence each. Found by tens of thousands of random changes; one of each class
is kept here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_hostile import change, refused, run, spoil

from moetool import MoetoolError, strict_json
from moetool.forward import stock

__all__ = ["dense", "moe", "text"]
from test_hostile import dense, moe, text

EXPERT = "model.layers.1.mlp.experts.5.{}.weight"
ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("matrix", ["gate_proj", "up_proj", "down_proj"])
def test_experts_that_are_no_numbers_cannot_be_compared(
    matrix: str, value: float, moe: Path, tmp_path: Path
) -> None:
    spoil(moe / "model.safetensors", EXPERT.format(matrix), value)
    said = run("merge", moe, tmp_path / "out", "--method", "alike")
    if value == 3e38:  # large, but a number
        assert said.code in (0, 1)
    else:
        assert said.code == 1 and "layer 1's experts" in said.err and "--strict" in said.err
        assert not (tmp_path / "out").exists()


def test_a_router_that_is_no_number_chooses_nobody(moe: Path, tmp_path: Path) -> None:
    spoil(moe / "model.safetensors", ROUTER, float("nan"))
    words = ["prune", moe, tmp_path / "out", "--method", "router-distance"]
    assert ROUTER in refused(1, *words)


@pytest.mark.parametrize("combine", ["svd", "ties", "mean"])
def test_decisions_replayed_on_weights_that_are_no_numbers(
    combine: str, moe: Path, text: Path, tmp_path: Path
) -> None:
    decided = tmp_path / "d.json"
    words = ["--calibrate", text, "--combine", combine, "--decisions", decided]
    made = run("merge", moe, tmp_path / "out", *words, "--dry-run")
    if made.code == 2:
        pytest.skip(made.err)
    spoil(moe / "model.safetensors", EXPERT.format("up_proj"), float("nan"))
    run("merge", moe, tmp_path / "out", "--combine", combine, "--decisions", decided)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
@pytest.mark.parametrize("verb", ["merge", "prune"])
def test_scales_that_are_no_numbers(
    verb: str, kind: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    if kind == "fp8":
        folder = packed.save_fp8(models("deepseek_v3"), tmp_path / "moe")
    else:
        folder = packed.save_mxfp4(models("gpt_oss"), tmp_path / "moe")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(tensors) if "experts" in n and "scale" in n)
    raw = tensors[name].view(-1)
    raw[0] = float("nan") if raw.is_floating_point() else 255
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    way = "alike" if verb == "merge" else "random"
    assert run(verb, folder, tmp_path / "out", "--method", way).code == (verb == "merge")


STRAYS = {
    "in a dense layer": "model.layers.0.mlp.experts.3.up_proj.weight",
    "beyond the last": "model.layers.1.mlp.experts.8.up_proj.weight",
    "far beyond": "model.layers.2.mlp.experts.99999999.down_proj.weight",
}


@pytest.mark.parametrize("where", STRAYS)
def test_experts_without_a_place(where: str, moe: Path, text: Path, tmp_path: Path) -> None:
    tensors = load_file(moe / "model.safetensors")
    tensors[STRAYS[where]] = tensors[EXPERT.format("up_proj")].clone()
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    for words in (
        ["prune", moe, tmp_path / "out", "--method", "random"],
        ["merge", moe, tmp_path / "out", "--method", "alike"],
        ["convert-layout", moe, tmp_path / "out", "--to", "fused"],
        ["profile", moe, tmp_path / "stats", "--calibrate", text],
    ):
        assert STRAYS[where] in refused(1, *words)
    run("inspect", moe)


def test_an_activation_that_nobody_computes(moe: Path, text: Path, tmp_path: Path) -> None:
    change(moe / "config.json", hidden_act="nan")
    assert "hidden_act" in refused(1, "merge", moe, tmp_path / "out", "--method", "alike")
    refused(1, "profile", moe, tmp_path / "stats", "--calibrate", text)


def test_heads_without_number(moe: Path, tmp_path: Path) -> None:
    plain = json.loads((moe / "config.json").read_text())
    del plain["head_dim"]
    for value in ([None], [], [4, 2], "4"):
        (moe / "config.json").write_text(json.dumps(plain | {"num_attention_heads": value}))
        run("prune", moe, tmp_path / "out", "--method", "random", "--dry-run")


BROKEN = {
    "gpt_oss": [{"swiglu_limit": []}, {"swiglu_limit": None}, {"swiglu_alpha": [1.7]}],
    "deepseek_v3": [{"n_group": None}, {"topk_group": [1]}, {"routed_scaling_factor": []}],
    "qwen3_moe": [{"rms_norm_eps": None}, {"layer_types": ["x"] * 4}, {"sliding_window": "x"}],
}


@pytest.mark.parametrize("family", BROKEN)
def test_configs_that_the_class_cannot_compute_with(
    family: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(models(family), tmp_path / "source"))
    plain = json.loads((source / "config.json").read_text())
    for fields in BROKEN[family]:
        (source / "config.json").write_text(json.dumps(plain | fields))
        run("eval", source, "--text", text)
        run("merge", source, tmp_path / "out", "--method", "alike", "--dry-run")


def test_a_fault_of_ours_is_not_put_on_transformers() -> None:
    from transformers.activations import SiLUActivation

    with pytest.raises(ZeroDivisionError), stock.running("model"):
        raise ZeroDivisionError
    with pytest.raises(MoetoolError, match="transformers cannot run"), stock.running("model"):
        SiLUActivation()("no tensor")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_tokenizer_that_is_not_there(
    family: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers makes an empty one for some families; a long text was then read to its end."""
    (tmp_path / "t.txt").write_text("words " * 9)
    said = refused(1, "eval", models(family), "--text", tmp_path / "t.txt")
    assert "no tokenizer" in said


FACTS: list[tuple[str, Any]] = [
    *(("experts", "gone"), ("experts", "8"), ("top_k", "gone"), ("top_k", None)),
    *(("seconds", ""), ("warnings", [{"a": 1}]), ("warnings", [None]), ("layers", [1.5])),
]


@pytest.mark.parametrize(("field", "value"), FACTS)
def test_every_fact_of_a_profile_is_looked_at(
    field: str, value: Any, moe: Path, text: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    assert run("profile", moe, stats, "--calibrate", text).code == 0
    facts = json.loads((stats / "profile.json").read_text()) | {field: value}
    if value == "gone":
        del facts[field]
    (stats / "profile.json").write_text(json.dumps(facts))
    assert field in refused(1, "profile", moe, stats, "--calibrate", text)
    assert field in refused(1, "prune", moe, tmp_path / "out", "--stats", stats)


def test_solved_tensors_of_an_edited_record(moe: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("prune", moe, out, "--calibrate", text, "--refit").code == 0
    plain = (out / "moetool.json").read_text()
    for place in range(6):
        for value in ("gone", None, "x", [], -1, 10**30, [None]):
            data = json.loads(plain)
            part = data["extra"][0]["tensors"][1]
            part[place] = value
            if value == "gone":
                del part[place]
            (out / "moetool.json").write_text(json.dumps(data))
            code = run("verify", out, "--against", moe, "--no-load").code
            assert code in (1, 2, 4) or (place, value) == (3, "x"), "a file is only a name"
    data = json.loads(plain)
    del data["decisions"]["layers"]["1"]
    (out / "moetool.json").write_text(json.dumps(data))
    assert "another model" in refused(2, "verify", out, "--against", moe)


WRITTEN: dict[str, list[str]] = {
    "upcycle": ["--experts", "4", "--split", "4", "--max-shard-size", "300KB"],
    "prune": ["--calibrate", "TEXT", "--refit"],
    "merge": ["--calibrate", "TEXT", "--method", "d2-moe"],
    "extend": ["--copy-expert", "1"],
    "convert-layout": ["--to", "fused"],
    "profile": ["--calibrate", "TEXT", "--covariance"],
}


@pytest.mark.parametrize("verb", WRITTEN)
def test_safetensors_opens_what_we_write_and_json_is_json(
    verb: str, dense: Path, moe: Path, text: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "out", dense if verb == "upcycle" else moe
    words = [str(text) if word == "TEXT" else word for word in WRITTEN[verb]]
    assert run(verb, source, out, *words).code == 0
    files = sorted(out.glob("*.safetensors"))
    for path in files:
        with safe_open(path, "np") as handle:
            assert all(handle.get_slice(n).get_shape() is not None for n in handle.keys())  # noqa: SIM118
    said = [p for p in out.glob("*.json") if p.name != "walk.json"]  # a seal alone
    parsed = [json.loads(p.read_text(), parse_constant=pytest.fail) for p in said]
    assert files and parsed


@pytest.mark.parametrize("device", ["x", "cuda:99", "meta", "\u00e9"])
def test_every_other_command_looks_at_its_device_first(
    device: str, dense: Path, tmp_path: Path
) -> None:
    """`verify` and `run`; tests/every/test_before.py tries those that take a model."""
    assert run("upcycle", dense, tmp_path / "out").code == 0
    words = ["verify", tmp_path / "out", "--against", dense]
    assert "--device" in refused(2, *words, "--device", device)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"method": "upcycle", "source": str(dense), "out": "new"}))
    assert "--device" in refused(2, "run", recipe, "--device", device)


def test_numbers_that_are_none_are_null_in_every_file_of_ours() -> None:
    values = {"a": float("nan"), "b": [float("inf"), 1.5]}
    lined = strict_json.lined({"schema": 1, "layers": {"0": values}}, "layers")
    for made in (lined, strict_json.text(values), strict_json.text(values, ascii=True)):
        assert "NaN" not in made and "Infinity" not in made
        json.loads(made, parse_constant=pytest.fail)
