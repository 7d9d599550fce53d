"""What only moetool runs, as a class that every client loads: the same logits, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import moetool
from moetool.errors import MoetoolError

Models = Callable[..., Path]
IDS = torch.randint(10, 150, (2, 24), generator=torch.Generator().manual_seed(1))


def trained(source: Path, out: Path, **options: Any) -> Path:
    """An upcycle whose experts are no longer what they were at birth."""
    moetool.upcycle(str(source), str(out), **options)
    (file,) = out.glob("*.safetensors")
    held, drawn = load_file(file), torch.Generator().manual_seed(3)
    for name, tensor in held.items():
        if name.endswith(("lora_B", "output_scale")):
            held[name] = torch.randn(tensor.shape, generator=drawn) * 0.05
        elif name.endswith("router.weight"):
            held[name] = torch.randn(tensor.shape, generator=drawn)
        elif name.endswith("weight_packed"):
            held[name] = tensor.roll(1, 0)
    save_file(held, file, {"format": "pt"})
    return out


def own_logits(folder: Path) -> torch.Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(v for k, v in info.items() if k != "error_msgs"), info
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=IDS).logits
    return made


@pytest.mark.parametrize(
    ("family", "target", "options"),
    [
        ("llama", "mixtral", {"form": "lora", "rank": 4}),
        ("llama", "qwen2_moe", {"form": "lora", "rank": 4, "law": "hard", "top_k": 1}),
        ("llama", "mixtral", {"form": "lora", "rank": 4, "law": "soft"}),
        ("phi3", "mixtral", {"form": "lora", "rank": 4}),
        ("qwen2", "qwen2_moe", {"form": "lora", "rank": 4, "law": "softmax", "layers": "1,3"}),
        ("qwen3", "qwen3_moe", {"form": "lora", "rank": 4}),
        ("llama", "glm4_moe", {"form": "lora", "rank": 4, "law": "hard", "top_k": 1}),
        ("qwen2", "qwen2_moe", {"form": "ternary", "top_k": 1}),
        ("llama", "qwen2_moe", {"form": "ternary", "exact": True, "scale_group": 32}),
        ("llama", "mixtral", {"target": "moetool"}),
    ],
)
def test_the_native_model_computes_the_same(
    family: str, target: str, options: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    own = trained(models(family), tmp_path / "own", experts=3, **options)
    native = tmp_path / "native"
    report = moetool.materialize(str(own), str(native), target=target)
    assert report["certificate"]["level"] == "exact"
    wanted = own_logits(own)
    apart = (tiny.logits(native) - wanted).abs().max() / wanted.abs().max()
    born = (tiny.logits(models(family)) - wanted).abs().max() / wanted.abs().max()
    assert apart < 1e-5, apart
    assert born > 1e-3 or (target == "mixtral" and "form" not in options)
    moetool.verify(str(native), against=[str(own)], load=False)


@pytest.mark.parametrize(
    ("family", "target", "options", "said"),
    [
        ("llama", "mixtral", {"form": "lora", "law": "softmax"}, "share of the softmax"),
        ("llama", "glm4_moe", {"form": "lora"}, "softmax that sums to one"),
        ("llama", "mixtral", {"form": "ternary"}, "no shared expert"),
        ("qwen2", "auto", {"form": "ternary", "activations": "int8"}, "int8"),
        ("gpt2", "auto", {"form": "lora"}, "gpt2"),
        ("llama", "auto", {"form": "null"}, "null"),
        ("llama", "auto", {"form": "adapter", "adapter_dim": 8}, "adapter experts"),
        ("llama", "auto", {"form": "film"}, "film experts"),
        ("llama", "gpt_oss", {"form": "lora"}, "gpt_oss"),
    ],
)
def test_what_no_class_computes(
    family: str,
    target: str,
    options: dict[str, Any],
    said: str,
    models: Models,
    tmp_path: Path,
) -> None:
    own = tmp_path / "own"
    moetool.upcycle(str(models(family)), str(own), experts=2, **options)
    with pytest.raises(MoetoolError) as raised:
        moetool.materialize(str(own), str(tmp_path / "native"), target=target)
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"
    assert not (tmp_path / "native").exists()


def test_a_native_model_is_none_of_it(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MoetoolError, match="no groups of experts"):
        moetool.materialize(str(llama), str(tmp_path / "native"))
