"""The forms of compressed-tensors: bytes against an encoder written here and against the library,
configs against the library's own rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed
import pytest
import torch

import moetool as api
from moetool.errors import MoetoolError
from moetool.kernels import codec
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms import targets
from moetool.surgery.spec import Stored, Target

Made = Callable[..., Path]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
WORDS = ["int2/32", "int3", "int4", "int4/channel", "int8", "int8/channel", "fp8", "mxfp4", "w8a8"]
FORCED = ["int4-asym", "int4-asym/channel", "int8-asym/32", "nvfp4", "mxfp8"]
NAME = "model.layers.0.mlp.up_proj.weight"


def awkward(dtype: str) -> torch.Tensor:
    """[24, 256] with rows of zeros, of tiny and of huge weights, and negative zeros."""
    torch.manual_seed(0)
    made = torch.randn(24, 256) * 0.05
    made[3] = 0
    made[4] *= 1e-3
    made[5, :128] *= 1e3
    made[6] *= 1e-6
    made[7] *= 2e4
    made[8, 1] = -0.0
    return made.to(DTYPES[dtype])


def encoded(word: str, dtype: str, matrix: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    """(the format, parts by the last word of their names as they lie in a file)."""
    target = Target(NAME, dtype, tuple(matrix.shape))
    asked = forms.settled(forms.asked(word), target)
    form = forms.named(asked.form)
    parts, said = form.encode(matrix, asked.params), form.parts(target, asked.params)
    lying = {
        t.name.rpartition(".")[2]: codec.decode(
            bytearray(codec.encode(p, t.dtype)), t.dtype, t.shape
        )
        for p, t in zip(parts, said, strict=True)
    }
    return asked, lying


def by_hand(word: str, matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(levels, scales) in float64, one group at a time, of float32 weights."""
    kind, _, size = word.partition("/")
    width = matrix.shape[1]
    if kind in ("fp8", "w8a8"):
        group, full = width, 448.0 if kind == "fp8" else 127.5
    elif kind == "mxfp4":
        group, full = 32, 4.0
    else:
        group = width if size == "channel" else int(size or 128)
        full = (2 ** int(kind[3:]) - 1) / 2
    rows = matrix.double().numpy().reshape(-1, width // group, group)
    most = np.abs(rows).max(-1)
    scale = (most.astype(np.float32) / np.float32(full)).astype(np.float64)
    if kind == "mxfp4":  # from 1.75 of a power of two on, the next one
        scale = 2.0 ** np.clip(np.floor(np.log2(np.maximum(most, 1e-45) / 1.75) + 1) - 2, -127, 127)
    scale[scale == 0] = 2.0**-23
    scaled = (rows / scale[..., None]).astype(np.float32).astype(np.float64)
    if kind == "fp8":
        table = np.unique(packed.e4m3()[~np.isnan(packed.e4m3())]).astype(np.float64)
    elif kind == "mxfp4":
        table = np.unique([*packed.FP4, *-packed.FP4]).astype(np.float64)
    else:
        bits = 8 if kind == "w8a8" else int(kind[3:])
        levels = np.clip(np.rint(scaled), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return levels.reshape(matrix.shape), scale
    away = np.abs(scaled[..., None] - table)
    near = away.argmin(-1)  # of two as near the one of an even number of steps from zero
    away = np.append(away, np.full((*near.shape, 1), np.inf), -1)
    tied = np.take_along_axis(away, near[..., None] + 1, -1)[..., 0] == away.min(-1)
    near += tied & (np.abs(near - len(table) // 2) % 2 == 1)
    return table[near].reshape(matrix.shape), scale


@pytest.mark.parametrize("word", WORDS)
def test_as_the_formats_are_defined(word: str) -> None:
    """float32 weights, in float64: every level, every scale, and what is decoded again."""
    matrix = awkward("F32")[:7]
    asked, lying = encoded(word, "F32", matrix)
    levels, scales = by_hand(word, matrix)
    made = forms.named(asked.form).decode(list(lying.values()), asked.params)
    wanted = levels.reshape(*scales.shape, -1) * scales[..., None]
    assert np.allclose(made.numpy(), wanted.reshape(matrix.shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", [*WORDS, *FORCED])
def test_bytes_are_those_of_the_library(word: str, dtype: str) -> None:
    """Its scales, its packing, its names and dtypes; and what it decodes."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    matrix = awkward(dtype)
    asked, lying = encoded(word, dtype, matrix)
    form = forms.named(asked.form)
    scheme = QuantizationScheme(targets=["Linear"], **form.scheme(asked.params))
    group = scheme.weights.group_size or matrix.shape[1]
    grouped = matrix.unflatten(-1, (-1, group))
    state = {"weight": matrix}
    if word == "nvfp4":
        state["weight_global_scale"] = generate_gparam(matrix.amin(), matrix.amax())
    scale, zero = calculate_qparams(
        grouped.amin(-1), grouped.amax(-1), scheme.weights, state.get("weight_global_scale")
    )
    library = BaseCompressor.get_value_from_registry(form.kind(asked.params))
    state["weight_scale"] = scale
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = zero
    theirs = library.compress(state, scheme)
    assert set(theirs) == set(lying)
    for name, mine in lying.items():
        assert mine.dtype == theirs[name].dtype and mine.shape == theirs[name].shape, name
        whole = [t.reshape(-1).view(torch.uint8) for t in (mine, theirs[name])]
        assert torch.equal(*whole), name
    decoded = library.decompress(dict(lying), scheme)["weight"]
    mine = form.decode(list(lying.values()), asked.params)
    assert torch.equal(mine.to(decoded.dtype), decoded)


MODULES = [
    *(f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"),
    *(f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")),
    *(
        f"model.layers.{i}.mlp.experts.{e}.w{p}"
        for i in (1, 2)
        for e in range(2)
        for p in (1, 2, 3)
    ),
    *(f"model.layers.{i}.mlp.shared_experts.{p}_proj" for i in (1, 2) for p in ("gate", "up")),
    "visual.blocks.0.self_attn.q_proj",
    *(f"model.layers.{i}.mlp.gate" for i in (1, 2)),
    "model.embed_tokens",
    "lm_head",
]


def split(where: Callable[[str], str]) -> tuple[list[list[str]], list[str], list[list[str]]]:
    """ConfigGroups of modules by a word, those of no word, and the targets for the groups."""
    words = {m: where(m) for m in MODULES}
    groups = [[m for m in MODULES if words[m] == w] for w in sorted({*words.values()} - {""})]
    full = [m for m in MODULES if not words[m]]
    return groups, full, targets.chosen(groups, full)


SPLITS: dict[str, Callable[[str], str]] = {
    "one": lambda m: "" if m.endswith((".gate", "tokens", "head")) else "a",
    "roles": lambda m: (
        "" if m.endswith((".gate", "tokens", "head")) or "visual" in m
        else "a" if ".experts." in m else "c" if "shared" in m else "b"
    ),
    "experts alone": lambda m: "a" if ".experts." in m else "",
    "layers": lambda m: (
        "" if m.endswith((".gate", "tokens", "head")) or "visual" in m
        else "b" if "layers.2." in m else "a"
    ),
    "mixed experts": lambda m: (
        "b" if ".experts.0." in m else "a" if ".experts." in m else "" if "v_proj" in m else "c"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_targets_mean_what_they_should(name: str) -> None:
    """By our reading of the rules and by the library's, for linears of every kind."""
    groups, full, said = split(SPLITS[name])
    quantized = [m for g in groups for m in g]
    ignored = targets.ignore(full, quantized)
    config = {
        "config_groups": {str(i): {"targets": t, "n": i} for i, t in enumerate(said)},
        "ignore": ignored,
    }
    read = targets.ConfigGroups.of(config)
    for i, group in enumerate(groups):
        assert all((read.find(m) or {}).get("n") == i for m in group), (said, ignored)
    assert not any(read.means(m) for m in full)
    match = pytest.importorskip("compressed_tensors.utils.match")
    known = {t: i for i, group in enumerate(said) for t in group}
    linear = torch.nn.Linear(1, 1)
    for module in MODULES:
        found = match.match_targets(module, linear, known)
        if match.is_match(module, linear, ignored) or not found:
            assert module in full
        else:
            assert module in groups[known[found[0]]], module


def test_experts_are_one_pattern_and_come_first() -> None:
    """What transformers 5 looks for, a name for the family's own words."""
    groups, _, said = split(SPLITS["roles"])
    assert said[0] == [targets.EXPERTS] and "Linear" in said[1]
    assert said[2] == [
        r"re:.*\.shared_experts\.gate_proj$",
        r"re:.*\.shared_experts\.up_proj$",
    ]
    assert targets.matches(targets.EXPERTS, "model.layers.1.mlp.experts")
    assert not any(targets.matches(targets.EXPERTS, m) for m in groups[2])


WIDE = {"head_dim": 32, "moe_intermediate_size": 64}
PLANS = {
    "int4/32": {"format": "int4/32"},
    "fp8": {"format": "fp8"},
    "mxfp4": {"format": "mxfp4"},
    "mixed": {"plan": "experts=int4/32,attn=int8/channel,dense=fp8"},
}


@pytest.mark.parametrize("plan", PLANS)
def test_the_library_takes_the_config(plan: str, models: Made, tmp_path: Path) -> None:
    """Validated, and applied to the model: each linear gets the scheme of its matrix."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from transformers import AutoConfig, AutoModelForCausalLM

    out = tmp_path / "out"
    api.quantize(
        str(models("qwen3_moe", dtype="bfloat16", **WIDE)), str(out), force=True, **PLANS[plan]
    )
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    known = {k: v for k, v in said.items() if k != "version"}
    config = quantization.QuantizationConfig.model_validate(known)
    assert json.loads(config.model_dump_json())["format"] == said["format"]
    plain = AutoConfig.from_pretrained(out)
    del plain.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain)
    quantization.apply_quantization_config(model, config, show_progress=False)
    read = Checkpoint.open(out)
    quantized = {n for n, t in read.tensors.items() if t.parts}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        scheme = getattr(module, "quantization_scheme", None)
        stored = read.tensors.get(f"{name}.weight")
        assert (scheme is not None) == (f"{name}.weight" in quantized), name
        if scheme is not None:
            form = forms.named(stored.parts.form)
            assert scheme.weights.num_bits == form.weights_of(stored.parts.params)["num_bits"]


def _lying(folder: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    return dict(Checkpoint.open(folder).stored), json.loads((folder / "config.json").read_text())


STRAY = {
    "zero points without their config": ("weight_zero_point", "I32", (8, 4)),
    "order of activations": ("weight_g_idx", "I32", (64,)),
    "sparse": ("bitmask", "U8", (128, 8)),
    "keys of a cache": ("k_scale", "BF16", (1,)),
}


@pytest.mark.parametrize("what", STRAY)
def test_what_no_form_explains_is_named(what: str, models: Made, tmp_path: Path) -> None:
    api.quantize(str(models("llama")), str(tmp_path / "out"), format="int4/32")
    tensors, config = _lying(tmp_path / "out")
    suffix, dtype, shape = STRAY[what]
    name = f"model.layers.0.self_attn.k_proj.{suffix}"
    tensors[name] = Stored(name, dtype, shape, "model.safetensors", 0, 0)
    with pytest.raises(MoetoolError, match="not understood") as problem:
        forms.seen(tensors, config)
    assert problem.value.where["tensor"] == name


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("int4/32", None),
        ("int4/32", {}),
        ("int4/32", {"quant_method": "gptq"}),
        ("fp8", {}),
        ("fp8-block", None),
        ("nf4", {"quant_method": "mxfp4"}),
        ("bnb-int8", None),
    ],
    ids=str,
)
def test_parts_that_the_config_does_not_explain(
    word: str, said: Any, models: Made, tmp_path: Path
) -> None:
    wide = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    made = models("llama", num_key_value_heads=4, **wide)
    api.quantize(str(made), str(tmp_path / "out"), format=word, force=True, loader_check=False)
    tensors, config = _lying(tmp_path / "out")
    with pytest.raises(MoetoolError, match="does not say what this part") as problem:
        forms.seen(tensors, config | {"quantization_config": said})
    assert problem.value.where["tensor"] in tensors
    assert problem.value.where["found"] == (json.dumps(said) if said else "config.json without any")


BROKEN: dict[str, Callable[[dict[str, Stored], dict[str, Any]], Any]] = {
    "lacks a part": lambda t, c: t.pop("model.layers.0.self_attn.k_proj.weight_scale"),
    "do not fit together": lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=8),
    "is no pattern": lambda t, c: c["config_groups"]["group_0"].update(targets=["re:("]),
    "not as compressed-tensors": lambda t, c: c["config_groups"]["group_0"]["weights"].pop(
        "num_bits"
    ),
    "transform_config": lambda t, c: c.update(transform_config={"config_groups": {"R1": {}}}),
    "not understood": lambda t, c: c.update(ignore=[r"re:.*self_attn.*"]),
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_file_is_named(said: str, models: Made, tmp_path: Path) -> None:
    api.quantize(str(models("llama")), str(tmp_path / "out"), format="int4/32")
    tensors, config = _lying(tmp_path / "out")
    BROKEN[said](tensors, config["quantization_config"])
    with pytest.raises(MoetoolError, match=said):
        forms.seen(tensors, config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config_groups", []),
        ("ignore", "lm_head"),
        ("ignore", [["lm_head"]]),
        ("config_groups.group_0", "int4"),
        ("config_groups.group_0.targets", "Linear"),
        ("config_groups.group_0.targets", [1]),
        ("config_groups.group_0.input_activations", []),
        ("config_groups.group_0.weights", []),
        ("config_groups.group_0.weights.num_bits", 4.0),
        ("config_groups.group_0.weights.num_bits", True),
        ("config_groups.group_0.weights.group_size", "32"),
    ],
)
def test_a_field_of_another_kind_is_named(
    field: str, value: object, models: Made, tmp_path: Path
) -> None:
    api.quantize(str(models("llama")), str(tmp_path / "out"), format="int4/32")
    tensors, config = _lying(tmp_path / "out")
    *path, last = field.split(".")
    part = config["quantization_config"]
    for word in path:
        part = part[word]
    part[last] = value
    with pytest.raises(MoetoolError, match="cannot be what it is") as problem:
        forms.seen(tensors, config)
    assert problem.value.where["field"] == f"quantization_config.{field}"


def test_blocks_of_what_comes_in_are_whole(models: Made, tmp_path: Path) -> None:
    with pytest.raises(MoetoolError, match="input width 64 is no multiple of 128"):
        api.quantize(str(models("llama")), str(tmp_path / "out"), format="fp8-block-ct")
