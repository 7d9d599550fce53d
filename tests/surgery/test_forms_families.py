"""Every form of compressed-tensors and fp8, mxfp4 of gpt-oss, in every kind of family: what lies in
the file, decoded by the definitions alone; and other verbs on such files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed
import pytest
import tiny
import torch

import moetool as api
from moetool.errors import MoetoolError
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import Target

Made = Callable[..., Path]
Arrays = dict[str, np.ndarray]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4},
    "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": 64},
    "mixtral": {"hidden_size": 64, "intermediate_size": 128},
    "deepseek_v3": {"q_lora_rank": 32, "kv_lora_rank": 32, "moe_intermediate_size": 64},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 96},
}
_WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
BLOCKS = {
    "llama": _WIDE,
    "qwen3_moe": _WIDE | {"moe_intermediate_size": 128},
    "mixtral": _WIDE,
}  # widths that 128 divides
WORDS = ("int2/32", "int3/32", "int4/32", "int5/channel", "int8/channel", "fp8", "mxfp4", "w8a8",
         "nvfp4", "mxfp8", "int4-asym/32", "int8-asym/channel", "fp8-block-ct")  # fmt: skip


def bits_of(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Numbers of so many bits, one behind the other, in rows of int32."""
    rows = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    lying = np.unpackbits(rows, axis=1, bitorder="little")[:, : columns * bits]
    return lying.reshape(len(words), columns, bits) @ (1 << np.arange(bits))


def halves(codes: np.ndarray) -> np.ndarray:
    """Two E2M1 a byte, the lower half first."""
    four = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
    return np.where(four & 8, -1, 1) * packed.FP4[four & 7]


def decoded(word: str, parts: Arrays, shape: tuple[int, int]) -> np.ndarray:
    """A matrix by the definition of its format, in float64."""
    kind = word.partition("/")[0]
    scale = parts["weight_scale"].astype(np.float64)
    if kind.startswith("int"):
        bits, half = int(kind[3]), 1 << int(kind[3]) - 1
        zero: np.ndarray | int = half
        if kind.endswith("asym"):
            zero = bits_of(parts["weight_zero_point"].T, bits, shape[0]).T
            zero = zero.repeat(shape[1] // scale.shape[1], 1)
        assert parts["weight_shape"].tolist() == list(shape)
        scale = scale.repeat(shape[1] // scale.shape[1], 1)
        return (bits_of(parts["weight_packed"], bits, shape[1]) - zero) * scale
    if kind in ("mxfp4", "nvfp4"):
        bytes_of = parts["weight_scale"]
        scale = 2.0 ** (bytes_of.astype(np.float64) - 127)
        if kind == "nvfp4":
            scale = packed.e4m3()[bytes_of] / float(parts["weight_global_scale"][0])
        return halves(parts["weight_packed"]) * scale.repeat(shape[1] // scale.shape[1], 1)
    if kind == "w8a8":
        return parts["weight"] * scale
    values = packed.e4m3()[parts["weight"]].astype(np.float64)
    if kind == "mxfp8":
        return values * (2.0 ** (scale - 127)).repeat(32, 1)
    side = 128 if kind == "fp8-block-ct" else max(shape)
    wide = scale.repeat(side if kind == "fp8-block-ct" else 1, 0).repeat(side, 1)
    return values * wide[: shape[0], : shape[1]]


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter as stock transformers computes with it, in bfloat16."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    model(torch.arange(8)[None])  # matrices stay packed until something runs
    return dict(model.named_parameters())


def lying(folder: Path) -> Arrays:
    return packed.values(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("word", WORDS)
def test_what_lies_in_the_file(word: str, family: str, models: Made, tmp_path: Path) -> None:
    """Names, dtypes and values of every matrix; all else byte for byte."""
    if word == "fp8-block-ct" and family not in BLOCKS:
        pytest.skip("its own sizes are too small for blocks of 128")
    shapes = BLOCKS[family] if word == "fp8-block-ct" else FAMILIES[family]
    source, out = models(family, dtype="bfloat16", **shapes), tmp_path / "out"
    how = {"format": word}
    if family == "gpt_oss":
        with pytest.raises(MoetoolError, match="stacked") if word != "mxfp4" else _nothing():
            api.quantize(str(source), str(out), format=word, force=True, overwrite=True)
        how = {"plan": f"attn={word}"}
    report = api.quantize(str(source), str(out), search="none", force=True, overwrite=True, **how)
    read, values, before = Checkpoint.open(out), lying(out), lying(source)
    plain = Checkpoint.open(source)
    matrices = {n: t for n, t in read.tensors.items() if t.parts}
    assert len(matrices) == sum(r["matrices"] for r in report["roles"].values())
    for name, tensor in matrices.items():
        assert tensor.parts is not None
        form, stem = forms.named(tensor.parts.form), name.removesuffix("weight")
        said = form.parts(Target(name, "BF16", tensor.shape), tensor.parts.params)
        assert [(p.name, p.dtype, p.shape) for p in tensor.parts.tensors] == [
            (t.name, t.dtype, t.shape) for t in said
        ]
        parts = {p.name.removeprefix(stem): values.pop(p.name) for p in tensor.parts.tensors}
        wanted = decoded(word, parts, tensor.shape)
        made = read.matrix(name).numpy()
        assert np.allclose(made, wanted, rtol=1e-6, atol=0)
        near = plain.matrix(name).float().numpy() - made
        assert np.sqrt(np.square(near).mean() / np.square(made).mean()) < LIMITS.get(word[:4], 0.2)
    assert all(np.array_equal(values[n], before[n]) for n in values)
    assert "embed" not in " ".join(matrices) and "lm_head" not in " ".join(matrices)


LIMITS = {"int2": 0.7, "int3": 0.35}


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_stacks_of_gpt_oss(models: Made, tmp_path: Path) -> None:
    """`mxfp4` means its own form there; attention stays full and is named; stock transformers reads
    exactly that.
    """
    source, out = models("gpt_oss", dtype="bfloat16", **FAMILIES["gpt_oss"]), tmp_path / "out"
    report = api.quantize(str(source), str(out), format="mxfp4")
    assert list(report["roles"]) == ["experts"] and report["experts_skipped"] == []
    assert {n for n in report["left"] if "self_attn" in n}
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "mxfp4"
    assert "model.layers.*.self_attn" in said["modules_to_not_convert"]
    read = Checkpoint.open(out)
    assert {t.parts.form for t in read.tensors.values() if t.parts} == {"mxfp4"}
    theirs = dict(tiny.load(out).named_parameters())
    for name, tensor in read.tensors.items():
        if tensor.parts:
            assert torch.equal(theirs[name].float(), read.matrix(name))


def test_blocks_of_fp8_from_nothing(models: Made, tmp_path: Path) -> None:
    """A scale for 128 x 128; what is full is named to the loader; other widths are refused."""
    wide = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128}
    source, out = models("qwen3_moe", **wide), tmp_path / "out"
    api.quantize(str(source), str(out), format="fp8-block")
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["weight_block_size"]) == ("fp8", [128, 128])
    assert "lm_head" in said["modules_to_not_convert"]
    assert "model.layers.1.mlp.gate" in said["modules_to_not_convert"]
    read, theirs = Checkpoint.open(out), dict(tiny.load(out).named_parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(theirs[name].float(), read.matrix(name))
    down = theirs["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(down[3], read.matrix("model.layers.1.mlp.experts.3.down_proj.weight"))
    with pytest.raises(MoetoolError, match="128 does not divide its") as problem:
        api.quantize(str(models("qwen3_moe")), str(tmp_path / "no"), format="fp8-block")
    assert "blocks at the edge" in str(problem.value)


CHAIN = ["int4/32", "fp8", "mxfp4", "int8/channel", "w8a8", "nvfp4", "int4-asym/32", "mxfp8"]


@pytest.mark.parametrize("word", CHAIN)
def test_from_one_format_to_another(word: str, models: Made, tmp_path: Path) -> None:
    """Decoded as it streams: equal to quantizing what was dequantized. To the same format again:
    there is nothing to do. Pruned: parts byte for byte, the config's words kept.
    """
    source = models("qwen3_moe", dtype="bfloat16", **FAMILIES["qwen3_moe"])
    one, full = tmp_path / "one", tmp_path / "full"
    how: dict[str, Any] = {"search": "none", "force": True}
    api.quantize(str(source), str(one), format=word, **how)
    with pytest.raises(MoetoolError, match="nothing to do"):
        api.quantize(str(one), str(tmp_path / "again"), format=word, **how)
    api.dequantize(str(one), str(full))
    read, plain = Checkpoint.open(one), Checkpoint.open(full)
    assert not plain.told and set(plain.tensors) == set(read.tensors)
    for name in read.tensors:
        assert torch.equal(read.matrix(name).to(torch.bfloat16), plain.matrix(name))
    pruned = tmp_path / "pruned"
    api.prune(str(one), str(pruned), method="router-distance", ratio=0.5)
    config = [json.loads((f / "config.json").read_text()) for f in (one, pruned)]
    assert config[0]["quantization_config"] == config[1]["quantization_config"]
    kept = Checkpoint.open(pruned)
    assert sum(1 for t in kept.tensors.values() if t.parts) == 55
    there = {v.tobytes() for v in lying(one).values()}
    assert all(v.tobytes() in there for n, v in lying(pruned).items() if "gate.weight" not in n)


@pytest.mark.parametrize("word", ["int8/channel", "fp8", "mxfp4", "int3/32"])
def test_other_words_from_int4(word: str, models: Made, tmp_path: Path) -> None:
    """In one task: what int4 says, rounded in float32 to the other format."""
    source = models("qwen3_moe", dtype="float32", **FAMILIES["qwen3_moe"])
    one, two = tmp_path / "one", tmp_path / "two"
    api.quantize(str(source), str(one), format="int4/32")
    api.quantize(str(one), str(two), format=word, search="none", force=True)
    read, made = Checkpoint.open(one), Checkpoint.open(two)
    for name, tensor in made.tensors.items():
        if tensor.parts:
            form = forms.named(tensor.parts.form)
            rounded = form.encode(read.matrix(name), tensor.parts.params)
            assert torch.equal(form.decode(rounded, tensor.parts.params), made.matrix(name))


@pytest.mark.parametrize("word", ["int4/32", "fp8", "mxfp4"])
def test_merged_in_the_same_form(word: str, models: Made, tmp_path: Path) -> None:
    """What was computed is rounded again, and stock transformers reads exactly that."""
    source = models("qwen3_moe", dtype="bfloat16", **FAMILIES["qwen3_moe"])
    one, out = tmp_path / "one", tmp_path / "out"
    api.quantize(str(source), str(one), format=word)
    api.merge(str(one), str(out), method="alike", ratio=0.5, form="same")
    made = Checkpoint.open(out)
    assert made.told == Checkpoint.open(one).told
    down = loaded(out)["model.layers.1.mlp.experts.down_proj"]
    assert len(down) == 4
    for number, matrix in enumerate(down):
        name = f"model.layers.1.mlp.experts.{number}.down_proj.weight"
        assert torch.equal(matrix, made.matrix(name).bfloat16())


def test_fused_matrices_share_a_global_scale(models: Made, tmp_path: Path) -> None:
    """nvfp4: q, k and v, and gate and up of each expert, the largest of all at 448 * 6."""
    source = models("qwen3_moe", dtype="bfloat16", **FAMILIES["qwen3_moe"])
    api.quantize(str(source), str(tmp_path / "out"), format="nvfp4", force=True)
    values, plain = lying(tmp_path / "out"), Checkpoint.open(source)

    def check(stem: str, *words: str) -> None:
        most = max(float(plain.matrix(f"{stem}.{w}.weight").abs().max()) for w in words)
        scales = [values[f"{stem}.{w}.weight_global_scale"] for w in words]
        assert all(np.array_equal(s, scales[0]) for s in scales)
        assert float(scales[0][0]) == pytest.approx(448 * 6 / most, rel=2**-8)

    check("model.layers.0.self_attn", "q_proj", "k_proj", "v_proj")
    check("model.layers.0.self_attn", "o_proj")
    check("model.layers.2.mlp.experts.5", "gate_proj", "up_proj")
    check("model.layers.2.mlp.experts.5", "down_proj")


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_width_between_whole_words(bits: int, models: Made, tmp_path: Path) -> None:
    """Without groups only `weight_shape` says how wide a matrix is; stock transformers agrees."""
    source = models("llama", dtype="bfloat16", hidden_size=60, intermediate_size=90)
    out, back = tmp_path / "out", tmp_path / "back"
    api.quantize(str(source), str(out), format=f"int{bits}/channel", search="none")
    read = Checkpoint.open(out)
    assert {n: t.shape for n, t in read.tensors.items()} == {
        n: t.shape for n, t in Checkpoint.open(source).tensors.items()
    }
    api.dequantize(str(out), str(back))
    theirs, plain = loaded(out), loaded(back)
    assert all(torch.equal(theirs[n], plain[n]) for n in plain)


def _same(one: Arrays, two: Arrays) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) for n in one)


def test_rounding_imports_what_it_needs(models: Made, tmp_path: Path) -> None:
    """torch, and neither transformers nor what torch's compiler brings along."""
    run = (
        "import sys, moetool; moetool.quantize(*sys.argv[1:3], format=sys.argv[3], loader_check=False);"
        " assert not {'transformers', 'sympy', 'torch._dynamo'} & set(sys.modules)"
    )
    source = models("qwen3_moe", dtype="bfloat16", **FAMILIES["qwen3_moe"])
    for word in ("int4/32", "mxfp4"):
        out = tmp_path / word.replace("/", "-")
        subprocess.run([sys.executable, "-c", run, source, out, word], check=True)
