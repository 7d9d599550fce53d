"""Groups of experts in a config: read as written, and strictly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moetool.errors import MoetoolError
from moetool.surgery import groups
from moetool.surgery.groups import Group
from moetool.surgery.route import Route

BASE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}
LORA = Group("lora", 4, (0, 2), params={"rank": 8}, route=Route(law="hard"))


def _images(ids: list[Any]) -> dict[str, Any]:
    """A route of four experts by modality."""
    return {"key": "modality", "options": {"allowed": [[1, 1, 1, 1]] * 2, "ids": ids}}


def told(**change: Any) -> dict[str, Any]:
    made = groups.config_of(dict(BASE), (LORA,))
    made["moetool"]["groups"][0] |= change
    return json.loads(json.dumps(made))


def test_what_is_written_is_read_and_the_base_comes_back() -> None:
    config = json.loads(json.dumps(groups.config_of(dict(BASE), (LORA,))))
    assert groups.is_ours(config) and config["architectures"] == ["MoeLlamaForCausalLM"]
    assert groups.read(config) == (LORA,)
    assert groups.base_of(config) == BASE
    assert config["moetool"]["groups"][0]["route"] == {"law": "hard"}  # the usual is not said


def test_names_inside_the_block() -> None:
    name = "model.layers.3.mlp.gate_proj.weight"
    assert (groups.block_of(name), groups.linear_of(name)) == ("model.layers.3.mlp", "gate_proj")
    assert LORA.expert(7, "gate_proj", "lora_A") == "experts.7.gate_proj.lora_A"
    assert (LORA.router, Group("full", 1, (0,), name="image").router) == ("router", "image_router")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rout": {}}, "route"),
        ({"route": {"lw": "hard"}}, "law"),
        ({"route": []}, "object"),
        ({"base": "over"}, "under"),
        ({"layers": 3}, "well formed"),
        ({"layers": ["a"]}, "whole number"),
        ({"experts": 2.5}, "whole number"),
        ({"route": {"top_k": 5}}, "1 to 4"),
        ({"name": "a.b"}, "letters"),
        ({"experts": 10**9}, "at most 4,096"),
        ({"scale": 10**400}, "`scale`"),
        ({"params": {"rank": 8, "targets": None}}, "`targets`"),
        ({"params": {"rank": 8, "linears": []}}, "`linears`"),
        ({"route": {"key": "task", "options": {"allowed": []}}}, "`allowed`"),
        ({"route": _images([[10**20]])}, "`ids`"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(MoetoolError) as raised:
        groups.read(told(**change))
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"


def test_another_version_and_two_groups_of_one_name() -> None:
    config = told()
    config["moetool"]["groups"] *= 2
    with pytest.raises(MoetoolError, match="two groups"):
        groups.read(config)
    config["moetool"]["version"] = 2
    with pytest.raises(MoetoolError, match="another version"):
        groups.read(config)
    with pytest.raises(MoetoolError, match="no groups"):
        groups.read(dict(BASE))
