"""Checkpoints of every class of a family: without a head, with another, of one tower alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from modeling.stacks import BY_NAME, IDS
from safetensors.torch import load_file, save_file

import moetool
from moetool.errors import MoetoolError
from moetool.surgery import classes
from moetool.surgery.family import MAY
from moetool.surgery.layout import Layout, families

BODIES = (
    ("bert-text", "BertModel", "AutoModel"),
    ("bert-text", "BertForSequenceClassification", "AutoModelForSequenceClassification"),
    ("vit-vision", "ViTModel", "AutoModel"),
    ("vit-vision", "ViTForMaskedImageModeling", "AutoModelForMaskedImageModeling"),
    ("llama-text", "LlamaModel", "AutoModel"),
    ("llama-text", "LlamaForTokenClassification", "AutoModelForTokenClassification"),
    ("gpt2-text", "GPT2Model", "AutoModel"),
    ("roberta-text", "RobertaModel", "AutoModel"),
    ("distilbert-text", "DistilBertModel", "AutoModel"),
    ("bart-decoder", "BartModel", "AutoModel"),
    ("t5-encoder", "T5Model", "AutoModel"),
    ("dinov2-vision", "Dinov2ForImageClassification", "AutoModelForImageClassification"),
)
FAST = ("BertModel", "LlamaForTokenClassification")


@pytest.mark.parametrize(
    ("name", "cls", "auto"),
    [pytest.param(*b, marks=[] if b[1] in FAST else [pytest.mark.slow]) for b in BODIES],
)
def test_every_class_of_a_family_becomes_a_mixture(
    name: str, cls: str, auto: str, tmp_path: Path
) -> None:
    stack = BY_NAME[name]._replace(cls=cls, auto=auto)
    source = stack.save(tmp_path / "source")
    said: dict[str, Any] = {"experts": 2, "top_k": 1, "form": "lora", "rank": 2}
    moetool.upcycle(str(source), str(tmp_path / "out"), tower=stack.says, **said)
    loader = getattr(transformers, auto)
    stock, (model, info) = (
        loader.from_pretrained(source).eval(),
        loader.from_pretrained(tmp_path / "out", output_loading_info=True),
    )
    assert not any(info.values()) and type(model).__name__ == f"Moe{cls}"
    with torch.no_grad():
        torch.manual_seed(0)
        wanted = stock(**stack.inputs(stock.config), return_dict=False)[0]
        torch.manual_seed(0)
        found = model.eval()(**stack.inputs(model.config), return_dict=False)[0]
    assert torch.equal(found, wanted)
    old, new = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "out"))
    assert all(torch.equal(new[n], t) for n, t in old.items())
    assert not moetool.inspect(str(tmp_path / "out"))["unknown_tensors"] or "For" in cls
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == new.keys()


def test_a_hole_in_the_layers_of_another_head_is_refused(tmp_path: Path) -> None:
    stack = BY_NAME["bert-text"]._replace(cls="BertForSequenceClassification")
    source = stack.save(tmp_path / "source")
    held = load_file(source / "model.safetensors")
    del held["bert.encoder.layer.1.attention.self.key.weight"]
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoetoolError, match="missing"):
        moetool.upcycle(str(source), str(tmp_path / "out"), experts=2, top_k=1, form="null")


def test_the_layout_is_of_the_class_that_a_config_names() -> None:
    named = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    whole, other = Layout.load("bert"), named | {"architectures": ["BertForTokenClassification"]}
    assert classes.layout_of(named) == classes.layout_of({"model_type": "bert"}) == whole
    may = {s.name for s in classes.layout_of(other).tensors if s.layers == MAY}
    assert "cls.predictions.bias" in may and all(n.startswith("cls.") for n in may)
    bare = classes.layout_of(named | {"architectures": ["BertModel"]})
    names = {s.name for s in bare.tensors}
    assert "encoder.layer.{layer}.output.dense.weight" in names and "pooler.dense.bias" in names
    assert bare.towers[0].stem == "encoder.layer." and not any("bert." in n for n in names)
    assert sum(Layout.load(n).bare is not None for n in families()["dense"]) > 80


def test_a_batch_goes_through_what_has_no_head(tmp_path: Path) -> None:
    """A later verb reads what upcycle wrote of it."""
    source = BY_NAME["bert-text"]._replace(cls="BertModel").save(tmp_path / "source")
    out = tmp_path / "out"
    moetool.upcycle(str(source), str(out), experts=2, top_k=1, form="null", layers="1")
    assert moetool.verify(str(out), against=[str(source)], load=False)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MoeBertModel"]
    made = transformers.AutoModel.from_pretrained(out)(input_ids=IDS)
    assert made.last_hidden_state.shape == (2, 9, 16)
