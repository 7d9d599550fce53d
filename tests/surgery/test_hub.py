"""Families whose class lies on the Hub, read as a class of transformers, against what their own
code computes (an independent one in float64).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import inside
from safetensors.torch import load_file, save_file
from surgery import hub_models

import moetool
from moetool.errors import MoetoolError
from moetool.surgery import hub
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import rows, whole

LONG = torch.randint(5, 300, (2, 90), generator=torch.Generator().manual_seed(0))
LINEAR = {"rope_scaling": {"type": "linear", "factor": 4.0}}


def far(made: torch.Tensor, folder: Path, **said: Any) -> float:
    """From what its own code computes, relative to the largest logit."""
    expected = hub_models.logits(folder, LONG, **said)
    return float((made - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "said", [{}, {"bias": True, "rope_scaling": None}, {"num_key_value_heads": 8, **LINEAR}]
)
def test_it_computes_what_its_own_code_does(said: dict[str, Any], tmp_path: Path) -> None:
    """Beyond its trained length too, where dynamic positions change."""
    source = hub_models.save(tmp_path / "source", **said)
    with torch.no_grad():
        read = moetool.load(str(source), dtype="float32").eval()(input_ids=LONG).logits
    assert far(read, source) < 1e-5
    report = moetool.convert_layout(str(source), str(tmp_path / "stock"), to="stock")
    assert report["certificate"]["level"] == "exact"
    moetool.verify(str(tmp_path / "stock"), against=[str(source)], load=True)
    model = tiny.load(tmp_path / "stock")
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert torch.equal(model(input_ids=LONG).logits, read)


def test_a_mixture_of_it(tmp_path: Path) -> None:
    source, out = hub_models.save(tmp_path / "source", torch.bfloat16), tmp_path / "out"
    report = moetool.upcycle(str(source), str(out), experts=4)
    assert report["certificate"]["level"] == "exact"
    with torch.no_grad():
        logits = tiny.load(out).float()(input_ids=LONG).logits
    assert far(logits, source) < 1e-5
    lora = tmp_path / "lora"
    moetool.upcycle(str(source), str(lora), form="lora", rank=4, experts=2)
    joined = load_file(source / "model.safetensors")["model.layers.1.attention.wqkv.weight"]
    parts = joined.view(2, 6, 16, 128)
    for folder in (out, lora):
        held = load_file(next(folder.glob("*.safetensors")))
        head = "model.layers.1.self_attn."
        assert torch.equal(held[f"{head}q_proj.weight"], parts[:, :4].reshape(128, 128))
        assert torch.equal(held[f"{head}k_proj.weight"], parts[:, 4].reshape(32, 128))
        assert torch.equal(held[f"{head}v_proj.weight"], parts[:, 5].reshape(32, 128))
    assert "lm_head.weight" in held


def test_pieces_of_joined_matrices(tmp_path: Path) -> None:
    source = Checkpoint.open(hub_models.save(tmp_path / "source"))
    name = "model.layers.0.self_attn.q_proj.weight"
    every = source.matrix(name)
    some = rows(source.tensor(name), 50, 117)
    assert torch.equal(source.matrix(some), every[50:117])
    assert torch.equal(torch.from_numpy(source.numbers(some)).float(), every[50:117])
    assert sum(p.count for p in [whole(t) for t in source.stored.values()]) == sum(
        t.elements for t in source.tensors.values()
    )


def test_a_second_ffn_is_an_expert_of_image_tokens(tmp_path: Path) -> None:
    source = hub_models.save(tmp_path / "source", **hub_models.TWOFOLD)
    images = torch.zeros_like(LONG).bool()
    images[:, 4:40] = True
    model = moetool.load(str(source), dtype="float32").eval()
    with torch.no_grad():
        text = model(input_ids=LONG).logits
        both = model(input_ids=LONG, modality=images.long()).logits
    assert far(text, source) < 1e-5 and far(both, source, images=images) < 1e-5
    assert (both - text).abs().max() > 0.1
    assert "InternLM2VEForCausalLM" in inside("inspect", source).stdout
    moetool.convert_layout(str(source), str(tmp_path / "own"), to="stock")
    moetool.verify(str(tmp_path / "own"), against=[str(source)])
    moetool.materialize(str(source), str(tmp_path / "text"), target="base")
    assert far(logits_of(tmp_path / "own"), source) < 1e-5
    assert far(logits_of(tmp_path / "text"), source) < 1e-5


def logits_of(folder: Path) -> torch.Tensor:
    """Of the long ids, by the plain Auto class."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=LONG).logits
    return made


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"architectures": ["InternLM2ForRewardModel"]}, "does not know: InternLM2ForRewardModel"),
        ({"num_key_value_heads": 3}, "heads in num_key_value_heads blocks"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "a multiple of 21 rows"),
        ({"vocab_size": 301}, "wrong shape"),
    ],
)
def test_what_is_refused(said: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = hub_models.save(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | said
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoetoolError) as raised:
        moetool.upcycle(str(source), str(tmp_path / "out"))
    assert words in f"{raised.value} {raised.value.where}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", [{}, hub_models.TWOFOLD])
def test_a_language_model_inside_another(said: dict[str, Any], tmp_path: Path) -> None:
    """Taken out of an InternVL, with its tower left out by name; nothing else does that."""
    plain = hub_models.save(tmp_path / "plain", **said)
    source = hub_models.save_inside(plain, tmp_path / "source")
    with pytest.raises(MoetoolError, match="inside a class of the Hub") as raised:
        moetool.upcycle(str(source), str(tmp_path / "out"))
    assert "--to stock" in str(raised.value.hint)
    report = moetool.convert_layout(str(source), str(tmp_path / "out"), to="stock")
    assert report["certificate"]["level"] == "exact_if"
    assert set(report["dropped_tensors"]) >= {
        "mlp1.0.weight",
        "vision_model.embeddings.class_embedding",
    }
    moetool.verify(str(tmp_path / "out"), against=[str(source)], load=True)
    assert far(logits_of(tmp_path / "out"), plain) < 1e-5
    with torch.no_grad():
        read = moetool.load(str(source), dtype="float32").eval()(input_ids=LONG).logits
    assert far(read, plain) < 1e-5
    assert "not known to the family: 2" in inside("inspect", source).stdout


def test_a_hole_is_named(tmp_path: Path) -> None:
    source = hub_models.save(tmp_path / "source")
    held = load_file(source / "model.safetensors")
    del held["model.layers.1.attention.wqkv.weight"]
    save_file(held, source / "model.safetensors")
    with pytest.raises(MoetoolError, match="is missing") as raised:
        moetool.upcycle(str(source), str(tmp_path / "out"))
    assert "q_proj" in str(raised.value.where) or "k_proj" in str(raised.value.where)


def test_data_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"model_types": ["a"], "cls": "A", "famly": "llama"}))
    with pytest.raises(MoetoolError, match="not well formed"):
        hub.HubFamily.read(path)
    assert [one.model_types for one in hub.families()] == [("internlm2", "internlm2ve")]
