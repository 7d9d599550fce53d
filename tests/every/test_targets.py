"""Every conversion x every kind of upcycle: stock transformers loads it with nothing missing, and
the logits are the source's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import moetool
from moetool.surgery.pair import Pair, pairs

VARIANTS: dict[str, dict[str, object]] = {
    "copies": {"experts": 4, "top_k": 2},
    "copies-top1": {"experts": 3, "top_k": 1},
    "fused": {"experts": 4, "top_k": 2, "layout": "fused"},
    "permuted": {"experts": 4, "top_k": 2, "diversify": "permute"},
    "groups": {"experts": 8, "split": 2, "top_k": 4},
    "groups-random": {"experts": 8, "split": 4, "top_k": 4, "carve": "random"},
    "all-parts": {"experts": 4, "split": 4, "top_k": 4},
    "shared": {"experts": 4, "split": 2, "top_k": 2, "shared": True},
    "last-half": {"experts": 4, "top_k": 2, "layers": "second-half"},
    "every-2": {"experts": 4, "top_k": 2, "layers": "every:2+1"},
}
# Which variants a target can hold; every other one must be refused with a sentence.
SITES_ANY = {"qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "cohere2_moe", "ernie4_5_moe"}
SITES_PREFIX = {"glm4_moe", "dots1", "lfm2_moe"} | SITES_ANY
SHARED = {"qwen2_moe", "glm4_moe", "dots1", "cohere2_moe", "ernie4_5_moe", "qwen3_5_moe_text"}

_logits: dict[Path, object] = {}


def inner_target(pair: Pair) -> str:
    return pair.inner.partition("--")[2] if pair.inner else pair.target


def holds(pair: Pair, variant: str) -> bool:
    target = inner_target(pair)
    if target == "phimoe" and ("split" in VARIANTS[variant] or VARIANTS[variant]["top_k"] != 2):
        return False
    return {
        "shared": target in SHARED,
        "last-half": target in SITES_PREFIX,
        "every-2": target in SITES_ANY,
    }.get(variant, True)


def test_all_pairs_are_here() -> None:
    assert len(pairs()) == 20
    assert {p.source for p in pairs()} == set(tiny.FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pair", pairs(), ids=lambda p: f"{p.source}-{p.target}")
def test_function_is_kept(
    pair: Pair, variant: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = models(pair.source), tmp_path / "out"
    if not holds(pair, variant):
        with pytest.raises(moetool.MoetoolError) as refused:
            moetool.upcycle(str(source), str(out), target=pair.target, **VARIANTS[variant])
        assert inner_target(pair) in str(refused.value) and refused.value.hint
        assert not out.exists()
        return
    report = moetool.upcycle(str(source), str(out), target=pair.target, **VARIANTS[variant])
    assert report["certificate"]["level"] in ("exact", "exact_if")
    assert report["certificate"]["coverage"] == pytest.approx(1.0)
    if source not in _logits:
        _logits[source] = tiny.logits(source)
    expected, made = _logits[source], tiny.logits(out)
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("pair", pairs(), ids=lambda p: f"{p.source}-{p.target}")
def test_verify_agrees(pair: Pair, models: Callable[..., Path], tmp_path: Path) -> None:
    """Byte, block and structure checks of our own, without transformers."""
    out = tmp_path / "out"
    moetool.upcycle(str(models(pair.source)), str(out), target=pair.target, experts=4, top_k=2)
    found = moetool.verify(str(out), against=[str(models(pair.source))], load=False)
    assert found["verified"] == "bytes and function"
    assert len(found["blocks"]) == 4 and max(b["relative"] for b in found["blocks"]) < 1e-5
    assert found["structure"]["names_checked"] > 20
    assert found["accounted"]["tensors_used"] > 20


@pytest.mark.parametrize(
    ("family", "change", "word"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("granite", {"mlp_bias": True}, "mlp_bias"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "window",
        ),
        (
            "stablelm",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.25,
                }
            },
            "partial_rotary_factor",
        ),
        ("stablelm", {"use_qkv_bias": True}, "use_qkv_bias"),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor",
        ),
    ],
)
def test_what_would_be_lost_is_refused(
    family: str, change: dict[str, object], word: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(moetool.MoetoolError, match=word) as refused:
        moetool.upcycle(str(models(family, **change)), str(tmp_path / "out"))
    assert refused.value.exit_code == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}},
        ),
        ("llama", {"hidden_act": "gelu"}),
        ("mistral", {"sliding_window": None}),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "long_factor": [2.0] * 8,
                    "short_factor": [1.5] * 8,
                },
                "original_max_position_embeddings": 16,
            },
        ),
        ("granite", {"attention_bias": True}),
        ("olmo2", {"attention_bias": True}),
        ("ernie4_5", {"tie_word_embeddings": True}),
        ("gemma", {"num_key_value_heads": 1}),
        ("gemma", {"tie_word_embeddings": False}),
    ],
)
def test_config_traps_are_kept(
    family: str, change: dict[str, object], models: Callable[..., Path], tmp_path: Path
) -> None:
    source = models(family, **change)
    moetool.upcycle(str(source), str(tmp_path / "out"), experts=4)
    expected, made = tiny.logits(source), tiny.logits(tmp_path / "out")
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen3", "llava", "cohere2"])
def test_layouts_convert_both_ways(
    family: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    moetool.upcycle(str(models(family)), str(tmp_path / "a"), experts=4)
    moetool.convert_layout(str(tmp_path / "a"), str(tmp_path / "b"), to="fused")
    moetool.convert_layout(str(tmp_path / "b"), str(tmp_path / "c"), to="per-expert")
    from moetool.surgery.checkpoint import Checkpoint

    a, b, c = (Checkpoint.open(tmp_path / n) for n in "abc")
    assert set(a.tensors) == set(c.tensors) and len(b.tensors) < len(a.tensors)
    from moetool.surgery.spec import whole

    assert all(a.read(whole(t)) == c.read(whole(c.tensors[n])) for n, t in a.tensors.items())
    assert (
        tiny.logits(tmp_path / "b") - tiny.logits(models(family))
    ).abs().max() <= 1e-5 * tiny.logits(models(family)).abs().max()
    assert (
        moetool.verify(str(tmp_path / "b"), against=[str(tmp_path / "a")])["verified"]
        == "bytes and function"
    )


@pytest.mark.parametrize(
    ("family", "target", "word"),
    [
        ("llama", "qwen3_moe", "self_attn.k_norm.weight"),
        ("qwen3", "mixtral", "no place for self_attn.k_norm.weight"),
        ("llama", "olmoe", "k_norm"),
        ("mistral", "minimax_m2", "same names|needs"),
    ],
)
def test_a_target_without_a_conversion_says_what_keeps_them_apart(
    family: str, target: str, word: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(moetool.MoetoolError, match=word) as refused:
        moetool.upcycle(str(models(family)), str(tmp_path / "out"), target=target)
    assert "--target auto" in refused.value.hint


def test_bfloat16_is_what_float32_says_within_its_floor(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    """A factor of 3 rounds in bfloat16, and the certificate says so; a factor of 4 does not."""
    source = models("llama", dtype="bfloat16", intermediate_size=192)
    three = moetool.upcycle(str(source), str(tmp_path / "3"), experts=3, split=3, top_k=3)
    four = moetool.upcycle(str(source), str(tmp_path / "4"), experts=4, split=4, top_k=4)
    assert (
        "rounded to BF16" in three["certificate"]["why"]
        and three["certificate"]["level"] == "exact_if"
    )
    assert four["certificate"]["level"] == "exact"
    expected = tiny.logits(source)
    assert (tiny.logits(tmp_path / "4") - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (tiny.logits(tmp_path / "3") - expected).abs().max() <= 2e-2 * expected.abs().max()


TIED = {"tie_word_embeddings": True}
WIDE = {"intermediate_size": 256}


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", "qwen2_moe"),
        ("qwen2", "qwen2_moe"),
        ("llama", "glm4_moe"),
        ("qwen2", "glm4_moe"),
        ("qwen3", "glm4_moe"),
        ("qwen3", "dots1"),
    ],
)
def test_other_clients_find_what_they_expect(
    family: str, target: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """A head of its own, biases, a shared expert of a usual width: of a tied dense model too, and
    without another function.
    """
    source, out = models(family, **TIED, **WIDE), tmp_path / "out"
    report = moetool.upcycle(str(source), str(out), target=target, experts=4)
    assert report["certificate"]["level"] == "exact"
    held = load_file(out / "model.safetensors")
    text = json.loads((out / "config.json").read_text())
    shared = {n: t for n, t in held.items() if ".shared_expert" in n and "gate.weight" not in n}
    assert len(shared) == 3 * 4 and not any(t.any() for t in shared.values())
    width = 128 if target == "qwen2_moe" else 256
    assert {max(t.shape) for t in shared.values()} == {max(width, 64)}
    assert text.get("n_shared_experts", 1) == 1
    if target != "dots1":
        assert text["tie_word_embeddings"] is False
        assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])
    biases = [t for n, t in held.items() if n.endswith("_proj.bias")]
    assert len(biases) == (12 if target == "qwen2_moe" or family == "qwen2" else 0)
    assert text.get("qkv_bias", text.get("attention_bias")) == bool(biases)
    assert family == "qwen2" or not any(t.any() for t in biases)
    expected, made = tiny.logits(source), tiny.logits(out)
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_switch_of_a_shared_expert_is_a_half_but_not_zero(
    dtype: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """llama.cpp divides by what the switch sees: zero would be no number there."""
    source, out = models("llama", dtype=dtype), tmp_path / "out"
    moetool.upcycle(str(source), str(out), target="qwen2_moe", shared=True)
    held = load_file(out / "model.safetensors")
    switches = [t for n, t in held.items() if n.endswith("shared_expert_gate.weight")]
    assert len(switches) == 4
    seen = torch.randn(64, switches[0].shape[1], generator=torch.Generator().manual_seed(0))
    for switch in switches:
        assert switch.dtype == getattr(torch, dtype) and bool((switch != 0).all())
        own = torch.nn.functional.linear(seen.to(switch.dtype), switch)
        assert bool((torch.sigmoid(own) == 0.5).all())
        whole = seen @ switch.float().T
        there = torch.nn.functional.silu(whole) / whole
        assert float((there - 0.5).abs().max()) < (2e-6 if dtype == "float16" else 1e-7)
    moetool.verify(str(out), against=[str(source)], load=False)
