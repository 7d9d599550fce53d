"""The seven primitives, one by one: what they decide, what they refuse, and their statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.methods import site
from moetool.methods.upcycle import assemble, carve, scale
from moetool.methods.upcycle.diversify import Diversify
from moetool.methods.upcycle.route import Router
from moetool.surgery.layout import Layout


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6)),
        ("none", ()),
        ("every:2", (0, 2, 4, 6)),
        ("every:2+1", (1, 3, 5)),
        ("every:3+2", (2, 5)),
        ("first-half", (0, 1, 2)),
        ("second-half", (3, 4, 5, 6)),
        ("last:2", (5, 6)),
        ("0", (0,)),
        ("5,0-2", (0, 1, 2, 5)),
    ],
)
def test_sites(spec: str, layers: tuple[int, ...]) -> None:
    assert site.parse(spec, 7) == layers


@pytest.mark.parametrize(
    "spec",
    [
        "every",
        "every:0",
        "7",
        "0,9",
        "last:8",
        "last:0",
        "every:2+7",
        "half",
        "",
        "1-",
        "-1",
        "all ",
    ],
)
def test_wrong_sites(spec: str) -> None:
    with pytest.raises(UsageError) as refused:
        site.parse(spec, 7)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    [
        ("qwen3_moe", (0, 2), {"mlp_only_layers": [1, 3], "decoder_sparse_step": 1}),
        ("glm4_moe", (2, 3), {"first_k_dense_replace": 2}),
        (
            "cohere2_moe",
            (1, 2, 3),
            {
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "prefix_dense_intermediate_size": 96,
            },
        ),
        (
            "ernie4_5_moe",
            (1, 3),
            {"moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 2},
        ),
        ("mixtral", (0, 1, 2, 3), {}),
    ],
)
def test_site_fields_are_read_back(
    family: str, layers: tuple[int, ...], expected: dict[str, Any]
) -> None:
    layout = Layout.load(family)
    made = layout.overlay.sites.fields(layers, 4, 96)
    assert made == expected
    assert layout.moe_layers({"num_hidden_layers": 4, **made}) == set(layers)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("", 4, 1, 1), (0, 0, 0, 0)),
        (("", 4, 1, 4), (0, 1, 2, 3)),
        (("", 3, 1, 4), (1, 2, 3)),
        (("", 4, 1, 3), (1, 1, 2, 2)),
        (("", 8, 2, 4), (0, 0, 1, 1, 2, 2, 3, 3)),
        (("0,1,1,2", 4, 1, 3), (0, 1, 1, 2)),
        (("2,0", 4, 2, 3), (2, 2, 0, 0)),
    ],
)
def test_expert_maps(args: tuple[Any, ...], expected: tuple[int, ...]) -> None:
    assert assemble.expert_map(*args) == expected


@pytest.mark.parametrize(
    "args", [("", 5, 1, 4), ("0,1", 4, 1, 2), ("0,1,2,9", 4, 1, 3), ("a,b", 2, 1, 2)]
)
def test_wrong_expert_maps(args: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        assemble.expert_map(*args)


@pytest.mark.parametrize(
    ("spec", "count", "weights"),
    [
        ("base", 3, None),
        ("mean", 4, [0.25] * 4),
        ("weights:2,-1", 2, [2.0, -1.0]),
        ("interp:0.25", 2, [0.75, 0.25]),
    ],
)
def test_trunk_weights(spec: str, count: int, weights: list[float] | None) -> None:
    assert assemble.trunk_weights(spec, count) == weights


@pytest.mark.parametrize(
    ("spec", "count"),
    [("weights:1", 2), ("interp:0.5", 3), ("interp:2", 2), ("average", 2), ("weights:", 1)],
)
def test_wrong_trunks(spec: str, count: int) -> None:
    with pytest.raises(UsageError):
        assemble.trunk_weights(spec, count)


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 0},
        {"top_k": -1},
        {"experts": 2, "top_k": 3},
        {"experts": 6, "split": 4},
        {"layout": "stacked"},
        {"router": "gaussian"},
        {"router": "group:0.1"},
        {"carve": "random"},
        {"carve": "kmeans:down", "split": 2},
        {"diversify": "drop:2"},
        {"diversify": "shake"},
        {"diversify": "mask:1"},
        {"experts": "many"},
        {"shared": "perhaps"},
        {"scale": "big"},
        {"trunk": "median"},
        {"nonsense": 1},
        {"split": 3, "experts": 3},
        {"layers": "none"},
        {"target": "same"},
        {"expert_map": "0,1"},
    ],
    ids=str,
)
def test_wrong_options_are_usage_errors(
    options: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        moetool.upcycle(str(llama), str(tmp_path / "out"), **options)
    assert refused.value.exit_code == 2 and refused.value.hint and not (tmp_path / "out").exists()


def test_expert_width_stays_a_multiple_of_8(models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiple of 8"):
        moetool.upcycle(
            str(models("llama", intermediate_size=144)), str(tmp_path / "out"), experts=4, split=4
        )


# --- scale: the coverage identity
# -------------------------------------------------------------------------------------


def solve(**changes: Any) -> Any:
    values = {
        "experts": 8,
        "top_k": 2,
        "split": 1,
        "router_law": "normal",
        "router_repeat": 1,
        "shared": False,
        "changed": False,
        "assembled": False,
        "asked": "auto",
    }
    target = changes.pop("target", Layout.load("mixtral"))
    return scale.solve(scale.Combination(**{**values, **changes}), target)


def test_certificates() -> None:
    assert (solve().level, solve().scale, solve().place) == ("exact", 1.0, "none")
    groups = solve(experts=64, split=8, top_k=8, router_repeat=8)
    assert (groups.level, groups.scale, groups.place, groups.coverage) == (
        "exact_if",
        8.0,
        "down_proj",
        1.0,
    )
    assert solve(experts=4, split=4, top_k=4, router_repeat=4).level == "exact"
    assert solve(experts=8, split=4, top_k=2).level == "expectation"
    assert (
        solve(experts=64, split=8, top_k=8, router_repeat=8, target=Layout.load("glm4_moe")).place
        == "config"
    )
    assert (
        solve(target=Layout.load("phimoe")).scale,
        solve(target=Layout.load("phimoe")).level,
    ) == (0.5, "exact")
    assert solve(changed=True).level == "none" and solve(assembled=True).coverage is None
    assert solve(asked="3").level == "none" and solve(asked="3").coverage == 3.0
    assert solve(shared=True, changed=True).level == "exact"  # routed experts are silent anyway
    assert solve(shared=True, asked="1").level == "none"
    assert solve(shared=True, asked="1").coverage == 2.0
    assert solve(experts=6, split=4, top_k=2).level == "none"  # the last copy is cut short
    with pytest.raises(UsageError):
        solve(asked="big")


def test_rounding_is_said() -> None:
    three = solve(experts=3, split=3, top_k=3, router_repeat=3)
    assert "rounded to BF16" in scale.rounded(three, "BF16", False).why
    assert scale.rounded(three, "F32", False) == three
    assert (
        scale.rounded(solve(experts=4, split=4, top_k=4, router_repeat=4), "BF16", False).level
        == "exact"
    )
    assert "norms" in scale.rounded(solve(), "F16", True).why


# --- diversify and carve, on tensors
# ----------------------------------------------------------------------------------


def expert(tensors: dict[str, Any], layer: int, number: int) -> tuple[Any, Any, Any]:
    base = f"model.layers.{layer}.block_sparse_moe.experts.{number}."
    return tensors[base + "w1.weight"], tensors[base + "w3.weight"], tensors[base + "w2.weight"]


def dense(tensors: dict[str, Any], layer: int) -> tuple[Any, Any, Any]:
    base = f"model.layers.{layer}.mlp."
    return (
        tensors[base + "gate_proj.weight"],
        tensors[base + "up_proj.weight"],
        tensors[base + "down_proj.weight"],
    )


def made(source: Path, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    moetool.upcycle(str(source), str(out), **options)
    return load_file(source / "model.safetensors"), load_file(out / "model.safetensors")


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_drop_redraws_whole_neurons(ratio: float, llama: Path, tmp_path: Path) -> None:
    """The count is exact, gate, up and down agree on the neurons, the rest is untouched bit for
    bit.
    """
    before, after = made(llama, tmp_path / "out", experts=4, diversify=f"drop:{ratio}")
    changed = []
    for number in range(4):
        gate, up, down = expert(after, 1, number)
        old = dense(before, 1)
        rows = [(gate != old[0]).any(1), (up != old[1]).any(1), (down != old[2]).any(0)]
        assert all(int(r.sum()) == int(128 * ratio) for r in rows)
        assert (rows[0] == rows[1]).all() and (rows[0] == rows[2]).all()
        changed.append(tuple(rows[0].tolist()))
    assert len(set(changed)) == (4 if 0 < ratio < 1 else 1)


def test_drop_reference_draws_three_sets(llama: Path, tmp_path: Path) -> None:
    before, after = made(llama, tmp_path / "out", experts=4, diversify="drop:0.5:reference")
    gate, up, _ = expert(after, 0, 0)
    a, b = (gate != dense(before, 0)[0]).any(1), (up != dense(before, 0)[1]).any(1)
    assert int(a.sum()) == int(b.sum()) == 64 and (a != b).any()


def test_drop_matches_statistics(models: Callable[..., Path], tmp_path: Path) -> None:
    """Mean and deviation of the new entries are those of the old ones (5 standard errors)."""
    source = models("llama", intermediate_size=2048, num_hidden_layers=1)
    before, after = made(source, tmp_path / "out", experts=2, diversify="drop:0.5")
    for new, old in zip(expert(after, 0, 1), dense(before, 0), strict=True):
        moved = new != old
        fresh, gone = new[moved].double(), old[moved].double()
        error = gone.std() / moved.sum().sqrt()
        assert (
            abs(fresh.mean() - gone.mean()) < 5 * error and abs(fresh.std() / gone.std() - 1) < 0.02
        )


def test_a_mask_zeroes_a_share_of_each_matrix(llama: Path, tmp_path: Path) -> None:
    """Entries are the source's or zero; every expert and matrix has places of its own."""
    before, after = made(llama, tmp_path / "out", experts=2, diversify="mask:0.3")
    places = []
    for number in range(2):
        for new, old in zip(expert(after, 1, number), dense(before, 1), strict=True):
            gone = new == 0
            assert (new[~gone] == old[~gone]).all()
            assert abs(float(gone.float().mean()) - 0.3) < 0.02
            places.append(gone if gone.shape[0] == 128 else gone.T)
    assert all((a != b).any() for a, b in itertools.combinations(places, 2))


def test_noise_is_relative_to_the_deviation(models: Callable[..., Path], tmp_path: Path) -> None:
    source = models("llama", intermediate_size=2048, num_hidden_layers=1)
    before, after = made(source, tmp_path / "out", experts=2, diversify="noise:0.1")
    for new, old in zip(expert(after, 0, 0), dense(before, 0), strict=True):
        assert float((new - old).std() / old.std()) == pytest.approx(0.1, rel=0.02)
    assert not (expert(after, 0, 0)[0] == expert(after, 0, 1)[0]).all()


def test_permute_moves_neurons_together(llama: Path, tmp_path: Path) -> None:
    before, after = made(llama, tmp_path / "out", experts=2, diversify="permute")
    gate, up, down = expert(after, 0, 0)
    old = dense(before, 0)
    order = [(old[0] == row).all(1).nonzero().item() for row in gate]
    assert sorted(order) == list(range(128)) and order != list(range(128))
    assert (up == old[1][order]).all() and (down == old[2][:, order]).all()


@pytest.mark.parametrize("kind", ["contiguous", "random", "kmeans:gate", "kmeans:up"])
def test_carve_deals_every_neuron_once(kind: str, llama: Path, tmp_path: Path) -> None:
    before, after = made(llama, tmp_path / "out", experts=8, split=4, top_k=4, carve=kind)
    old = dense(before, 2)
    dealt = []
    for number in range(8):
        gate, up, down = expert(after, 2, number)
        rows = [(old[0] == row).all(1).nonzero().item() for row in gate]
        assert (
            len(rows) == 32 and (up == old[1][rows]).all() and (down == 4 * old[2][:, rows]).all()
        )
        dealt.append(rows)
    assert (
        sorted(n for rows in dealt[:4] for n in rows) == list(range(128)) and dealt[:4] == dealt[4:]
    )
    assert (dealt[0] == list(range(32))) == (kind == "contiguous")


def test_every_copy_is_shuffled_anew_and_the_rest_of_the_last_one_discarded(
    llama: Path, tmp_path: Path
) -> None:
    options = {"split": 4, "top_k": 2, "carve": "shuffled", "router": "normal:0.02"}
    before, after = made(llama, tmp_path / "out", experts=6, **options)
    old, dealt = dense(before, 1), []
    for number in range(6):
        gate, up, down = expert(after, 1, number)
        rows = [(old[0] == row).all(1).nonzero().item() for row in gate]
        assert (up == old[1][rows]).all() and (down == 4 * old[2][:, rows]).all()
        dealt.append(rows)
    first, second = (set(chain.from_iterable(some)) for some in (dealt[:4], dealt[4:]))
    assert first == set(range(128)) and len(second) == 64
    assert not {frozenset(rows) for rows in dealt[:4]} & {frozenset(rows) for rows in dealt[4:]}
    with pytest.raises(UsageError, match="whole groups"):
        made(llama, tmp_path / "no", experts=6, **options | {"top_k": 4, "router": "group:0.02"})


@pytest.mark.parametrize("target", ["glm4_moe", "qwen2_moe"])  # a factor in the config; a gate
def test_a_shared_expert_beside_experts_at_full_output(
    target: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """All parts at the weight 1 and the FFN: as if down_proj were doubled."""
    source, out = models("qwen2", num_hidden_layers=2), tmp_path / "out"
    options = {"experts": 4, "split": 4, "top_k": 4, "scale": "4", "router": "zero"}
    done = moetool.upcycle(str(source), str(out), target=target, shared=True, **options)
    assert done["certificate"]["level"] == "none" and done["certificate"]["coverage"] == 2.0
    dense, mixture = (AutoModelForCausalLM.from_pretrained(f).float() for f in (source, out))
    ids = torch.arange(24)[None]
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.down_proj.weight *= 2
        assert (dense(ids).logits - mixture(ids).logits).abs().max() < 1e-5


def test_router_rows_repeat_in_groups(llama: Path, tmp_path: Path) -> None:
    _, after = made(llama, tmp_path / "out", experts=8, split=4, top_k=4)
    router = after["model.layers.0.block_sparse_moe.gate.weight"]
    assert (
        (router[:4] == router[0]).all()
        and (router[4:] == router[4]).all()
        and (router[0] != router[4]).all()
    )


def test_zero_router(llama: Path, tmp_path: Path) -> None:
    _, after = made(llama, tmp_path / "out", experts=4, router="zero")
    assert not after["model.layers.3.block_sparse_moe.gate.weight"].any()


def test_parsers() -> None:
    assert Diversify.parse("permute+drop:0.5:reference+noise:0.01") == Diversify(
        True, 0.01, 0.5, False
    )
    assert Diversify.parse("mask:0.5") == Diversify(masked=0.5)
    assert Diversify.parse("none").params(0, "gate", 0) == {}
    assert Router.parse("auto", 1, 2) == Router("normal", 0.02) and Router.parse(
        "auto", 4, 8
    ) == Router("normal", 0.02, 4)
    assert Router.parse("uniform:0.1", 1, 2) == Router("centred", 0.1) and Router.parse(
        "normal:0", 1, 2
    ) == Router("zero")
    assert carve.parse("kmeans", 2) == ("kmeans", "gate")


# --- assemble -------------------------------------------------------------------------------------
# --------------------


@pytest.fixture
def tunes(models: Callable[..., Path]) -> list[str]:
    return [str(models("llama", seed=s)) for s in range(4)]


def test_one_expert_from_each(tunes: list[str], tmp_path: Path) -> None:
    report = moetool.upcycle(tunes[0], str(tmp_path / "out"), experts_from=tunes[1:], experts=4)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for number, folder in enumerate(tunes):
        assert all(
            (a == b).all()
            for a, b in zip(
                expert(after, 2, number),
                dense(load_file(Path(folder) / "model.safetensors"), 2),
                strict=True,
            )
        )
    assert (
        after["model.norm.weight"]
        == load_file(Path(tunes[0]) / "model.safetensors")["model.norm.weight"]
    ).all()
    assert report["certificate"]["level"] == "none" and report["expert_sources"] == [0, 1, 2, 3]
    assert [r["source"] for r in report["trunks"]] == tunes[1:] and all(
        0.5 < r["distance"] < 2 for r in report["trunks"]
    )
    assert moetool.verify(str(tmp_path / "out"), against=tunes, load=False)["verified"] == "bytes"


def test_trunk_mean_and_interpolation(tunes: list[str], tmp_path: Path) -> None:
    import torch

    moetool.upcycle(
        tunes[0], str(tmp_path / "mean"), experts_from=tunes[1:], experts=4, trunk="mean"
    )
    name = "model.layers.1.self_attn.q_proj.weight"
    parts = [load_file(Path(t) / "model.safetensors")[name].double() for t in tunes]
    assert torch.equal(
        load_file(tmp_path / "mean" / "model.safetensors")[name], (sum(parts) / 4).float()
    )
    for share, expected in (("0", 0), ("1", 1)):
        moetool.upcycle(
            tunes[0],
            str(tmp_path / share),
            experts_from=[tunes[1]],
            layers="none",
            target="same",
            trunk=f"interp:{share}",
        )
        a, b = (
            load_file(tmp_path / share / "model.safetensors"),
            load_file(Path(tunes[expected]) / "model.safetensors"),
        )
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_identical_fine_tunes_are_seen_as_such(tunes: list[str], tmp_path: Path) -> None:
    report = moetool.upcycle(tunes[0], str(tmp_path / "out"), experts_from=[tunes[0]], experts=2)
    assert report["trunks"][0]["distance"] == 0.0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_size": 32, "head_dim": 8}, "hidden_size"),
        ({"intermediate_size": 64}, "intermediate_size"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"num_hidden_layers": 5}, "num_hidden_layers"),
        ({"vocab_size": 200}, "vocab_size"),
        ({"dtype": "bfloat16"}, "float32|F32|BF16"),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope"),
    ],
)
def test_sources_that_differ(
    change: dict[str, Any], word: str, models: Callable[..., Path], llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(MoetoolError, match=word) as refused:
        moetool.upcycle(
            str(llama),
            str(tmp_path / "out"),
            experts_from=[str(models("llama", **change))],
            experts=2,
        )
    assert (
        "expected" in refused.value.where
        and "found" in refused.value.where
        and not (tmp_path / "out").exists()
    )


def test_another_family_is_refused(
    models: Callable[..., Path], llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(MoetoolError, match="same architecture"):
        moetool.upcycle(
            str(llama), str(tmp_path / "out"), experts_from=[str(models("mistral"))], experts=2
        )


# --- what is refused about a source
# -----------------------------------------------------------------------------------


def test_extra_tensor_is_not_dropped_silently(llama: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoetoolError, match="lora_A"):
        moetool.upcycle(str(source), str(tmp_path / "out"))


def test_a_whole_model_without_a_target_is_refused(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    import transformers

    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=160, n_positions=64)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(MoetoolError, match="no conversion"):
        moetool.upcycle(str(tmp_path / "gpt2"), str(tmp_path / "out"))
    with pytest.raises(MoetoolError, match="already has experts"):
        moetool.upcycle(str(models("mixtral")), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_hidden_layers": 3}, "layer that the config does not have"),
        ({"num_hidden_layers": 5}, "missing"),
        ({"hidden_size": 128}, "wrong shape"),
        ({"vocab_size": 161}, "wrong shape"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"model_type": "nonesuch"}, "no layout"),
        ({"model_type": "gpt2"}, "missing"),
        ({"model_type": "mixtral"}, "missing"),
        ({"num_key_value_heads": 4}, "wrong shape"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_config_and_weights_must_agree(
    change: dict[str, Any], word: str, llama: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    source = Path(shutil.copytree(llama, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(MoetoolError) as refused:
        moetool.upcycle(str(source), str(tmp_path / "out"))
    assert word in str(refused.value), refused.value
    assert refused.value.exit_code == 1


def test_old_rotary_buffers_are_dropped_by_name(llama: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = moetool.upcycle(str(source), str(tmp_path / "out"))
    assert list(report["dropped_tensors"]) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
