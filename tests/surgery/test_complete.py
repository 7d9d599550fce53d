"""Sources with holes, or with tensors of other shapes than their config says, are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from moetool.errors import MoetoolError
from moetool.surgery import complete
from moetool.surgery.checkpoint import Checkpoint

Arrays = dict[str, np.ndarray]
Harm = Callable[[Arrays], object]
Models = Callable[..., Path]

DOWN = "model.layers.2.mlp.experts.3.down_proj.weight"


def cut(name: str) -> Harm:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(arrays[name][..., :-8])})


def turned(name: str) -> Harm:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(arrays[name].T)})


def without(words: str) -> Harm:
    def harm(arrays: Arrays) -> None:
        for name in [n for n in arrays if words in n]:
            del arrays[name]

    return harm


HARMS: dict[str, Harm] = {
    "lm_head": without("lm_head"),
    "norm": without("model.norm"),
    "q_proj": without("layers.1.self_attn.q_proj"),
    "layer": without("layers.2."),
    "last layer": without("layers.3."),
    "embeddings": without("embed_tokens"),
    "down_proj": without("layers.2.mlp.experts.3.down_proj"),
    "transposed": turned(DOWN),
    "cut": cut(DOWN),
    "cut head": cut("lm_head.weight"),
    "cut router": cut("model.layers.2.mlp.gate.weight"),
}


def harmed(model: Path, folder: Path, harm: Harm) -> Path:
    shutil.copytree(model, folder)
    arrays = load_file(folder / "model.safetensors")
    harm(arrays)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("harm", HARMS)
def test_holes_and_shapes_are_named(harm: str, models: Models, tmp_path: Path) -> None:
    model = harmed(models("qwen3_moe"), tmp_path / "model", HARMS[harm])
    with pytest.raises(MoetoolError) as caught:
        complete.check([Checkpoint.open(model)])
    assert {"file", "tensor", "expected", "found"} <= set(caught.value.where)
    assert caught.value.hint


def test_more_layers_in_the_config_than_on_disk(models: Models, tmp_path: Path) -> None:
    folder = harmed(models("qwen3_moe"), tmp_path / "model", lambda arrays: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(MoetoolError, match="missing"):
        complete.check([Checkpoint.open(folder)])


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MOE])
def test_whole_models_pass(family: str, models: Models) -> None:
    checkpoint = Checkpoint.open(models(family))
    assert all("not counted" in line for line in complete.check([checkpoint]))
    assert complete.compare(checkpoint).right > 20


def test_the_demo_passes() -> None:
    import moetool

    folder = Path(moetool.__file__).parent / "demo" / "model"
    assert complete.check([Checkpoint.open(folder)]) == []


def test_tied_heads_may_be_left_out(models: Models, tmp_path: Path) -> None:
    model = models("qwen3", tie_word_embeddings=True)
    assert complete.check([Checkpoint.open(model)]) == []


def test_matrices_in_a_form_nobody_here_knows_are_there(models: Models, tmp_path: Path) -> None:
    def gptq(arrays: Arrays) -> None:
        for name in [n for n in arrays if "experts" in n]:
            head = name.removesuffix("weight")
            arrays[head + "qweight"] = arrays.pop(name)[:8].astype(np.int32)

    folder = harmed(models("qwen3_moe"), tmp_path / "model", gptq)
    with pytest.raises(MoetoolError, match="missing"):
        complete.check([Checkpoint.open(folder)])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    assert complete.check([Checkpoint.open(folder)]) == []
