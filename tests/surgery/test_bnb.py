"""bitsandbytes' forms: the bytes of its own quantizers, its checkpoints read as it reads them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.test_profiles import ids
from safetensors.torch import load_file, save_file

import moetool as api
from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import Target

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
NAME = "model.layers.0.mlp.experts.3.up_proj.weight"
WIDE = {"head_dim": 32, "moe_intermediate_size": 128}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHAPES = [(96, 64), (128, 256), (5, 320), (260, 512)]
DECODED = [*SHAPES[:3], (6, 100), (3, 14)]  # blocks that run on over the ends of rows
Made = Callable[..., Any]
Tensors = dict[str, torch.Tensor]


def awkward(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Weights with rows of zeros, of tiny and of large numbers."""
    torch.manual_seed(sum(shape))
    weights = torch.randn(shape) * 0.05
    weights[0] = 0
    weights[1] *= 1e-4
    weights[2, : shape[1] // 2] *= 300
    return weights.to(dtype)


def theirs(weights: torch.Tensor, word: str) -> Tensors:
    """What the library stores for a matrix, by the end of its name."""
    from bitsandbytes import functional

    if word == "bnb-int8":
        codes, most, _ = functional.int8_vectorwise_quant(weights.half())
        order = torch.tensor(0, dtype=torch.uint8)
        return {"weight": codes, "SCB": most, "weight_format": order}
    kind, _, double = word.partition("-")
    packed, state = functional.quantize_4bit(
        weights, quant_type=kind, compress_statistics=bool(double)
    )
    lying = state.as_dict(packed=True)
    return {"weight": packed, **{f"weight.{k}": v for k, v in lying.items()}}


def ours(weights: torch.Tensor, dtype: str, word: str) -> Tensors:
    """The same of ours, held against the plan."""
    asked = forms.asked(word)
    form, target = forms.named(asked.form), Target(NAME, dtype, tuple(weights.shape))
    params = form.settled(target, asked.params)
    made, parts = form.encode(weights, params), form.parts(target, params)
    assert [tuple(m.shape) for m in made] == [p.shape for p in parts]
    stem = NAME.removesuffix("weight")
    return {p.name.removeprefix(stem): m for p, m in zip(parts, made, strict=True)}


def test_the_formats_there_are() -> None:
    words = [
        w for w, form in forms.formats().items() if forms.named(form).quant_method == "bitsandbytes"
    ]
    assert words == ["bnb-int8", "fp4", "fp4-double", "nf4", "nf4-double"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("word", ["nf4", "nf4-double", "fp4", "fp4-double"])
def test_the_bytes_are_the_librarys(word: str, shape: tuple[int, int], dtype: str) -> None:
    weights = awkward(shape, DTYPES[dtype])
    mine, expected = ours(weights, dtype, word), theirs(weights, word)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        if "double" in word and "quant_state" in name:  # padded: its length is known beforehand
            read = [json.loads(bytes(t.tolist())) for t in (mine[name], value)]
            assert read[0] == read[1]
        else:
            assert same(mine[name], value), name


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit."""
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_bytes_of_int8(shape: tuple[int, int], dtype: str) -> None:
    weights = awkward(shape, DTYPES[dtype])
    mine, expected = ours(weights, dtype, "bnb-int8"), theirs(weights, "bnb-int8")
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert same(mine[name], value), name


@pytest.mark.parametrize("word", ["nf4", "nf4-double", "fp4", "bnb-int8"])
@pytest.mark.parametrize("shape", DECODED, ids=str)
def test_decoded_as_the_library_does(word: str, shape: tuple[int, int]) -> None:
    from bitsandbytes import functional

    weights = awkward(shape, torch.float32)
    stored = theirs(weights, word)
    asked = forms.asked(word)
    form = forms.named(asked.form)
    names = [p.name for p in form.parts(Target("m.weight", "F32", shape), asked.params)]
    made = form.decode([stored[n.removeprefix("m.")] for n in names], asked.params).reshape(shape)
    if word == "bnb-int8":
        expected = functional.int8_vectorwise_dequant(stored["weight"], stored["SCB"])
    else:
        kind, _, double = word.partition("-")
        how = {"quant_type": kind, "compress_statistics": bool(double)}
        expected = functional.dequantize_4bit(*functional.quantize_4bit(weights, **how))
    assert torch.equal(made, expected)


def tensors(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("word", ["nf4", "fp4-double", "bnb-int8"])
def test_a_dense_model_of_transformers(word: str, models: Made, tmp_path: Path) -> None:
    """What transformers and bitsandbytes save: read, and written by us with the same bytes."""
    source = models("llama", dtype="bfloat16", head_dim=32)
    kind, _, double = word.partition("-")
    four = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": bool(double)}
    said = {"load_in_8bit": True} if word == "bnb-int8" else {"load_in_4bit": True, **four}
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=transformers.BitsAndBytesConfig(
            bnb_4bit_compute_dtype=torch.bfloat16, **said
        ),
        dtype=torch.bfloat16,
        device_map="cpu",
    )
    stock.save_pretrained(tmp_path / "stock")
    api.quantize(str(source), str(tmp_path / "ours"), format=word, method="rtn", search="none")
    mine, expected = tensors(tmp_path / "ours"), tensors(tmp_path / "stock")
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        state = "quant_state" in name and double
        assert state or same(mine[name], value), name
    opened = [Checkpoint.open(tmp_path / side) for side in ("ours", "stock")]
    for name, tensor in opened[1].tensors.items():
        assert opened[0].tensors[name].shape == tensor.shape
        assert torch.equal(opened[0].matrix(name), opened[1].matrix(name))
    assert sum(t.parts is not None for t in opened[1].tensors.values()) == 28
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    told = json.loads((tmp_path / "stock" / "config.json").read_text())["quantization_config"]
    differ = {k for k in config if k not in told or told[k] != config[k]}
    assert differ <= {"llm_int8_skip_modules", "bnb_4bit_compute_dtype"}, differ
    again, info = type(stock).from_pretrained(
        tmp_path / "ours", dtype=torch.bfloat16, device_map="cpu", output_loading_info=True
    )
    assert not any(info.values())
    text = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(again(text).logits, stock(text).logits)


@pytest.fixture(scope="module")
def mixtures(models: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """mixtures("qwen3_moe", "nf4") -> (folder in that format, the same in full float32)."""
    root, made = tmp_path_factory.mktemp("mixtures"), {}

    def get(family: str, word: str) -> tuple[Path, Path]:
        if (family, word) not in made:
            folder = root / f"{family}-{word}"
            full = folder.with_name(folder.name + "-full")
            how = {"method": "rtn", "search": "none", "for_": "transformers4", "force": True}
            api.quantize(str(models(family, **WIDE)), str(folder), format=word, **how)
            api.dequantize(str(folder), str(full))
            made[family, word] = folder, full
        return made[family, word]

    return get


@pytest.mark.parametrize("word", ["nf4-double", "bnb-int8"])
def test_every_verb_reads_it(word: str, mixtures: Made, tmp_path: Path) -> None:
    """eval, prune (parts byte for byte) and another format, as of the model in full."""
    folder, full = mixtures("qwen3_moe", word)
    seen, plain = api.inspect(str(folder)), api.inspect(str(full))
    for key in ("family", "parameters", "active_parameters", "layers", "unknown_tensors"):
        assert seen[key] == plain[key]
    text = {"text": [str(ids(tmp_path))], "seq_len": 40, "pack": False}
    told = api.eval(str(folder), reference=str(full), **text)
    assert abs(told["kl"]) < 1e-9
    out, twin = tmp_path / "out", tmp_path / "twin"
    api.prune(str(folder), str(out), method="router-distance", ratio=0.5)
    decided = {"decisions": str(out / "decisions.json"), "ratio": 0.5}
    api.prune(str(full), str(twin), method="router-distance", **decided)
    before, after = (json.loads((p / "config.json").read_text()) for p in (folder, out))
    assert after["quantization_config"] == before["quantization_config"]
    there = {raw(v) for v in tensors(folder).values()}
    kept = [t for t in Checkpoint.open(out).tensors.values() if t.parts]
    assert len(kept) > 30
    lying = tensors(out)
    assert all(raw(lying[p.name]) in there for t in kept for p in t.lying)
    made = Checkpoint.open(out)
    for name, value in tensors(twin).items():
        assert torch.equal(made.matrix(name), value), name
    for side, source in (("a", folder), ("b", full)):
        api.quantize(str(source), str(tmp_path / side), format="int4/32", method="rtn")
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(same(one[n], other[n]) for n in one)


@pytest.mark.parametrize("word", ["nf4-double", "bnb-int8"])
def test_solved(word: str, models: Made, tmp_path: Path) -> None:
    """gptq aims at the tables: nearer to the model on the text that it saw than rounding is."""
    source = models("qwen3_moe", num_hidden_layers=2, **WIDE)
    text = {"seq_len": 40, "pack": False}
    seen, kl = {"calibrate": [str(ids(tmp_path))], "tokens": 960, **text}, {}
    for method, more in (("rtn", {}), ("gptq", seen)):
        out = tmp_path / method
        api.quantize(str(source), str(out), format=word, method=method, force=True, **more)
        assert sum(t.parts is not None for t in Checkpoint.open(out).tensors.values()) > 24
        read = {"text": [str(ids(tmp_path))], **text}
        kl[method] = api.eval(str(out), reference=str(source), **read)["kl"]
    assert 0 < kl["gptq"] < kl["rtn"]


@pytest.mark.parametrize("word", ["nf4", "bnb-int8", "int4/32"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_what_is_not_finite_is_named(word: str, value: float, models: Made, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(models("llama", head_dim=32), source)
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = value
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoetoolError, match="NaN or inf") as problem:
        api.quantize(str(source), str(tmp_path / "out"), format=word, method="rtn")
    assert problem.value.where["tensor"].startswith(name)
    assert not (tmp_path / "out").exists()


def test_what_half_precision_cannot_hold(models: Made) -> None:
    form = forms.named("bnb_int8")
    with pytest.raises(MoetoolError, match="half precision"):
        form.encode(torch.tensor([[1e6, 1.0]]), {})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": [64, 64]}, "does not fit"),
        ({"shape": "wide"}, "means nothing"),
        ({"dtype": "int8"}, "means nothing"),
        ({"blocksize": 32}, "does not fit"),
        (None, "means nothing"),
    ],
    ids=str,
)
def test_a_damaged_state(
    change: JsonObject | None, match: str, mixtures: Made, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(mixtures("qwen3_moe", "nf4")[0], folder)
    lying = tensors(folder)
    name = next(n for n in lying if "quant_state" in n)
    said = b"{" if change is None else json.dumps(json.loads(bytes(lying[name])) | change).encode()
    lying[name] = torch.tensor(list(said), dtype=torch.uint8)
    save_file(lying, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoetoolError, match=match):
        Checkpoint.open(folder)


@pytest.mark.parametrize(("word", "part"), [("bnb-int8", "SCB"), ("nf4", "quant_state")])
def test_integers_that_nothing_scales(word: str, part: str, mixtures: Made, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(mixtures("qwen3_moe", word)[0], folder)
    lying = tensors(folder)
    lost = next(n for n in lying if part in n)
    del lying[lost]
    save_file(lying, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoetoolError, match="lacks a part") as problem:
        Checkpoint.open(folder)
    assert (
        problem.value.where["tensor"]
        == lost.partition(part)[0].rstrip(".").removesuffix(".weight") + ".weight"
    )


def test_integers_that_do_not_lie_in_rows(mixtures: Made, tmp_path: Path) -> None:
    folder = tmp_path / "turing"
    shutil.copytree(mixtures("qwen3_moe", "bnb-int8")[0], folder)
    lying = tensors(folder)
    name = next(n for n in lying if n.endswith("weight_format"))
    lying[name] = torch.full_like(lying[name], 2)
    save_file(lying, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoetoolError, match="does not lie in rows") as problem:
        Checkpoint.open(folder)
    assert problem.value.where["tensor"] == name
    assert "col_turing" in str(problem.value.where["found"])


def test_a_width_that_the_library_decodes_wrongly(models: Made, tmp_path: Path) -> None:
    with pytest.raises(MoetoolError, match="no multiple of 64") as problem:
        api.quantize(str(models("llama", head_dim=24)), str(tmp_path / "out"), format="nf4")
    assert "o_proj" in problem.value.where["tensor"]


def test_one_format_a_model(models: Made, tmp_path: Path) -> None:
    for plan in ("attn=nf4,dense=fp4", "attn=nf4,dense=bnb-int8", "attn=nf4,dense=nf4-double"):
        with pytest.raises(MoetoolError, match="one format"):
            api.quantize(
                str(models("llama", head_dim=32)), str(tmp_path / "out"), plan=plan, method="rtn"
            )
