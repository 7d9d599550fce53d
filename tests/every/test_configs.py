"""Every verb writes a config that all clients read, and transformers reads as the source's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moetool

VERBS: dict[str, Callable[[str, str], Any]] = {
    "upcycle": lambda src, out: moetool.upcycle(src, out, experts=4),
    "prune": lambda src, out: moetool.prune(src, out, method="router-distance", ratio=0.5),
    "merge": lambda src, out: moetool.merge(src, out, method="alike", ratio=0.5),
    "extend": lambda src, out: moetool.extend(src, out, copy_expert="0"),
    "convert-layout": lambda src, out: moetool.convert_layout(src, out, to="fused"),
    "quantize": lambda src, out: moetool.quantize(
        src, out, format="int8/channel", loader_check=False
    ),
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_config_of_transformers_5_is_spelled_for_all(
    verb: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    family = "qwen3" if verb == "upcycle" else "qwen3_moe"
    source, out = models(family, rope_parameters=YARN), tmp_path / "out"
    given = json.loads((source / "config.json").read_text())
    assert "rope_theta" not in given and given["rope_parameters"] == YARN
    VERBS[verb](str(source), str(out))
    said = json.loads((out / "config.json").read_text())
    assert said["rope_parameters"] == given["rope_parameters"] and said["rope_theta"] == 5e5
    assert said["rope_scaling"] == {k: v for k, v in YARN.items() if k != "rope_theta"}
    assert said["num_experts"] == said["num_local_experts"] and said["head_dim"] == 24
    read = [AutoConfig.from_pretrained(folder) for folder in (source, out)]
    assert read[0].rope_parameters == read[1].rope_parameters
    if verb == "quantize":
        moetool.dequantize(str(out), str(tmp_path / "back"))
        back = json.loads((tmp_path / "back" / "config.json").read_text())
        assert {k: said[k] for k in back} == back and set(said) - set(back) == {
            "quantization_config"
        }


def test_a_config_that_contradicts_itself_is_refused_before_any_work(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    source = models("qwen3_moe", rope_theta=1.0)
    path = source / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps(given | {"rope_theta": given["rope_parameters"]["rope_theta"] + 1}))
    with pytest.raises(moetool.MoetoolError, match="two things"):
        moetool.convert_layout(str(source), str(tmp_path / "out"), to="fused")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "target", "clients"),
    [("qwen3", "glm4_moe", "transformers5,vllm,mlx"), ("qwen3", "dots1", "vllm,mlx")],
)
def test_what_is_written_works_where_the_plan_says(
    family: str, target: str, clients: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Clients are asked what they make of the config that will be written, not of the source's."""
    source = models(family, tie_word_embeddings=True)
    moetool.upcycle(str(source), str(tmp_path / "out"), target=target, experts=4, for_=clients)
    pruned = str(tmp_path / "pruned")
    moetool.prune(str(tmp_path / "out"), pruned, method="router-distance", ratio=0.5, for_=clients)
