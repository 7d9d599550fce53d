"""What quantize refuses, in a sentence and before any work; what it takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetool import quantize, verify
from moetool.errors import MoetoolError, UsageError
from moetool.methods.quantize.options import Quantizing
from moetool.methods.quantize.scheme import Scheme
from moetool.surgery.checkpoint import Checkpoint

Source = Callable[..., Path]


@pytest.fixture
def source(models: Source) -> Source:
    return lambda family, **more: models(family, dtype="bfloat16", num_hidden_layers=2, **more)


def refused(source: Path, out: Path, **asked: Any) -> MoetoolError:
    with pytest.raises(MoetoolError) as problem:
        quantize(str(source), str(out / "out"), **asked)
    assert not [p for p in out.rglob("*.safetensors") if "source" not in str(p)]
    return problem.value


@pytest.mark.parametrize(
    ("plan", "said", "hint"),
    [
        ("experts=int4,atn=int8", "no role 'atn'", "did you mean attn?"),
        ("experts=int4,experts=int8", "experts two formats", "once"),
        ("experts", "is no ROLE=FORMAT", "once"),
        ("experts=int44", "no format 'int44'", "int4"),
        ("experts=int4/100", "no group of 100", "int4/128"),
        ("experts=full", "leaves everything full", "dequantize"),
        ("experts=int4,attn=gguf:q8_0", "mixes formats", "gguf:"),
    ],
)
def test_plans_that_mean_nothing(plan: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError) as problem:
        Scheme.of(Quantizing(plan=plan))
    assert said in problem.value.message and hint in problem.value.hint


def test_plans_as_people_write_them() -> None:
    asked = Scheme.of(Quantizing(plan=" experts = int4/64 , attn=int8/channel, dense=full,"))
    assert str(asked) == "experts=int4/64,attn=int8/channel"
    twice = Scheme.of(Quantizing(plan="experts=int4/64,experts=int4/64"))
    assert str(twice) == "experts=int4/64"
    for word in ("int8", "int4"):
        with pytest.raises(UsageError, match="exclude each other"):
            Scheme.of(Quantizing(format=word, plan="experts=int4"))
    with pytest.raises(UsageError, match="no format 'INT4'") as problem:
        Scheme.of(Quantizing(format="INT4"))
    assert problem.value.hint == "did you mean int4?"


def test_a_width_that_no_group_divides(source: Source, tmp_path: Path) -> None:
    """The first is named, all are counted, and what is offered is taken."""
    model = source("mixtral")
    problem = refused(model, tmp_path, format="int4")
    assert problem.where["tensor"] == "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert "64 is no multiple of the group 128" in problem.message
    assert "and 39 more" in problem.where["found"]
    assert problem.hint == "ask for int4/64, int4/32, int4/16 or int4/channel"
    assert quantize(str(model), str(tmp_path / "out"), format="int4/64")["experts_total"] == 48


def test_a_role_that_is_not_there(source: Source, tmp_path: Path) -> None:
    problem = refused(source("llama"), tmp_path, plan="experts=int4/32,attn=int8/32")
    assert isinstance(problem, UsageError) and problem.where["found"] == "experts"
    assert quantize(str(source("llama")), str(tmp_path / "out"), format="int4/32")


def test_numbers_that_are_none(source: Source, tmp_path: Path) -> None:
    model, broken = source("qwen3_moe"), tmp_path / "source"
    broken.mkdir()
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_text((model / "config.json").read_text())
    problem = refused(broken, tmp_path, format="int4/16")
    assert problem.where["tensor"] == name and "not finite" in problem.message


def test_what_is_quantized_already(source: Source, tmp_path: Path) -> None:
    made = tmp_path / "source"
    quantize(str(source("llama")), str(made), format="int4/32")
    problem = refused(made, tmp_path, format="int4/32")
    assert isinstance(problem, UsageError) and "int4/32 already" in problem.message
    report = quantize(str(made), str(tmp_path / "other"), format="int8/32")
    assert report["proof"]["relative_error"] < 0.02


def test_what_a_plan_does_not_name_stays_quantized(source: Source, tmp_path: Path) -> None:
    """Its bytes are the source's; and what is rounded again is said to be."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert not quantize(str(source("qwen3_moe")), str(one), format="int4/16")["warnings"]
    report = quantize(str(one), str(two), plan="experts=int8/16")
    before, after = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    names = [n for n in before if "self_attn" in n]
    assert any(n.endswith("q_proj.weight_packed") for n in names)
    assert all(torch.equal(before[n], after[n]) for n in names)
    made = Checkpoint.open(two)
    assert {t.parts.params["bits"] for t in made.tensors.values() if t.parts} == {4, 8}
    assert report["left"]["model.layers.0.self_attn.q_proj.weight"].endswith("as they are")
    assert "rounded a second time" in " ".join(report["warnings"])
    assert verify(str(two), against=[str(one)])["verified"] == "bytes"


def test_what_cannot_stay_quantized_is_said_to_be_decoded(source: Source, tmp_path: Path) -> None:
    quantize(str(source("qwen3_moe")), str(tmp_path / "one"), format="int4/16")
    asked: dict[str, Any] = {"plan": "experts=bnb-int8", "force": True}
    report = quantize(str(tmp_path / "one"), str(tmp_path / "two"), **asked)
    assert report["left"]["model.layers.0.self_attn.q_proj.weight"].endswith("decoded")
    assert "decoded to full weights" in " ".join(report["warnings"])


@pytest.mark.parametrize("method", ["gptq", "awq", "quanto"])
def test_a_form_that_nobody_reads(method: str, source: Source, tmp_path: Path) -> None:
    made = tmp_path / "source"
    made.mkdir()
    tensors = load_file(source("llama") / "model.safetensors")
    renamed = {n.replace("q_proj.weight", "q_proj.qweight"): t for n, t in tensors.items()}
    save_file(renamed, made / "model.safetensors", {"format": "pt"})
    config = json.loads((source("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (made / "config.json").write_text(json.dumps(config))
    problem = refused(made, tmp_path, format="int4/32")
    assert f"by {method}" in problem.message and "made from" in problem.hint


def test_a_config_that_says_nothing_of_quantization(source: Source, tmp_path: Path) -> None:
    """`null` is what some tools write for it."""
    model = tmp_path / "source"
    shutil.copytree(source("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert quantize(str(model), str(tmp_path / "out"), format="int4/32")["roles"]


@pytest.mark.parametrize("word", ["nf4", "bnb-int8", "nvfp4", "mxfp8", "fp8", "fp8-block"])
def test_the_input_embedding_stays_full(word: str, source: Source, tmp_path: Path) -> None:
    model = source("llama", hidden_size=128, vocab_size=256)
    problem = refused(model, tmp_path, plan=f"embed={word}")
    assert f"{word} embed" in problem.message


def test_experts_that_moetool_alone_loads(source: Source, tmp_path: Path) -> None:
    report = quantize(str(source("mixtral")), str(tmp_path / "out"), format="nf4")
    assert any("moetool.load(OUT) reads it, and transformers4" in w for w in report["warnings"])


def test_what_is_not_ternary_leaves_nothing_behind(source: Source, tmp_path: Path) -> None:
    """The values show it during the work; --force, which the error names, then works at once."""
    model, asked = source("llama"), {"format": "ternary", "loader_check": False}
    problem = refused(model, tmp_path, **asked)
    assert problem.where["file"] == str(model) and problem.where["tensor"].endswith("weight")
    assert "--force" in problem.hint and list(tmp_path.iterdir()) == []
    assert quantize(str(model), str(tmp_path / "out"), force=True, **asked)["roles"]


@pytest.mark.parametrize("word", ["mxfp4", "nvfp4", "mxfp8"])
def test_a_model_that_does_not_compute_in_bfloat16(
    word: str, models: Source, tmp_path: Path
) -> None:
    """What compressed-tensors decodes to bfloat16 meets activations of another dtype."""
    problem = refused(models("llama", dtype="float16"), tmp_path, format=word)
    assert "of a model in float16" in problem.message and "int8" in problem.hint


@pytest.mark.parametrize(
    ("family", "asked", "loader", "said", "hint"),
    [
        ("mixtral", {"plan": "attn=int4/32"}, "transformers5", "experts left full",
         "experts=int4/32"),
        ("mixtral", {"format": "w8a8"}, "transformers5", "RuntimeError", "--for transformers4"),
        ("mixtral", {"format": "int3/32"}, "vllm", "4 or 8 bits", "--for transformers5"),
        ("llama", {"plan": "embed=int8/32"}, "transformers5", "embedding", "--force"),
        ("llama", {"format": "int4/32"}, "llama.cpp", "GGUF", "--format gguf:q4_0"),
        ("llama", {"format": "gguf:q4_0"}, "vllm", "GGUF", "llama.cpp"),
        ("llama", {"format": "fp8"}, "mlx", "fp8", "no format is known that mlx reads"),
    ],
)  # fmt: skip
def test_what_the_loader_does_not_read(
    family: str, asked: dict[str, str], loader: str, said: str, hint: str, source: Source,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Loader, version and reason, and what to use instead; --force writes it with the reason."""
    more = {} if family == "mixtral" else {"tie_word_embeddings": False}
    problem = refused(source(family, **more), tmp_path, for_=loader, **asked)
    assert isinstance(problem, UsageError) and loader in problem.message
    assert said in str(problem) and hint in problem.hint
    if "gguf" in str(asked):
        return
    report = quantize(
        str(source(family, **more)), str(tmp_path / "out"), for_=loader, force=True, **asked
    )
    warning, *_ = (w for w in report["warnings"] if "--force" in w)
    assert loader in warning
    assert warning in (tmp_path / "out" / "README.md").read_text()
    assert warning in json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]


def test_linears_that_lie_the_other_way_round(tmp_path: Path) -> None:
    """gpt2's are Conv1D: packed along the wrong side they would load and be garbage."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    problem = refused(tmp_path / "source", tmp_path, format="int4/32")
    assert "[in, out]" in str(problem)


def test_an_untied_head_on_request(source: Source, tmp_path: Path) -> None:
    model = source("llama", tie_word_embeddings=False)
    plan = "dense=int4/32,attn=int8/32,lm_head=int8/32"
    report = quantize(str(model), str(tmp_path / "out"), plan=plan)
    assert report["roles"]["lm_head"]["matrices"] == 1
    tied = source("llama", tie_word_embeddings=True)
    problem = refused(tied, tmp_path / "no", plan=plan)
    assert problem.where["found"] == "lm_head"
