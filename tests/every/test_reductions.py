"""prune and merge over every family: outputs load in stock transformers with nothing missing and
compute what the cut block computes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_layouts_alone import ODD, make

import moetool
from moetool.forward import block as blocks
from moetool.forward.batches import Batch, Batches
from moetool.forward.walk import Budget, Walk
from moetool.methods.merge.parts.rebuild import Rule, merged_block
from moetool.methods.reduce.decided import Decided, read
from moetool.methods.reduce.decision import Decision
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.layout import Layout, families

IDS = np.random.default_rng(1).integers(10, 150, (2, 24))
TEXT = Batches((Batch(IDS, np.array([24, 24]), 0),), ("ids",), (48,), 24, "test")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids that every tiny model knows."""
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    dice = np.random.default_rng(2)
    path.write_text(
        "".join(
            json.dumps({"input_ids": dice.integers(10, 150, 40).tolist()}) + "\n" for _ in range(24)
        )
    )
    return path


def expected(
    folder: Path, layers: dict[int, Any], change: Callable[[int, Any, Any], Any]
) -> torch.Tensor:
    """Logits of the source with each MoE block changed in memory."""
    walk = Walk(Checkpoint.open(folder), TEXT, Budget())
    walk.run(change=lambda number, block: change(number, block, layers[number]))
    return walk.logits(0, 0, 24)


def logits(folder: Path) -> torch.Tensor:
    """Logits of an output in stock transformers, loading info empty (asserted)."""
    with torch.no_grad():
        return tiny.load(folder)(input_ids=torch.from_numpy(IDS)).logits


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-5) -> None:
    assert float((a - b).abs().max() / b.abs().max()) < limit


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("family", tiny.MOE)
def test_prune(
    family: str, ratio: float, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = models(family)

    def call():
        return moetool.prune(
            str(source),
            str(tmp_path / "out"),
            ratio=ratio,
            refit=False,
            method="reap",
            calibrate=[str(text)],
            tokens=400,
            seq_len=40,
        )

    if family == "deepseek_v2" and ratio == 0.25:  # 4 groups of 2: one from each, or none
        with pytest.raises(moetool.UsageError, match="leaves nothing to remove"):
            call()
        return
    report = call()
    assert report["experts_before"] == 8 and report["experts_after"] == round(8 * (1 - ratio))
    decided = Decided.from_json(report["decisions"])
    close(
        logits(tmp_path / "out"),
        expected(source, decided.layers, lambda n, block, layer: block.with_experts(layer.leads)),
    )
    checked = moetool.verify(str(tmp_path / "out"), against=[str(source)])
    assert checked["verified"] == "bytes" and checked["bytes"]["computed_tensors"] == 0
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (
        written["schema"] == 1
        and written["verb"] == "prune"
        and written["data"]["tokens"] == report["data"]["tokens"]
    )
    assert (
        json.loads((tmp_path / "out" / "experts.json").read_text())["layers"].keys()
        == written["layers"].keys()
    )


@pytest.mark.parametrize("family", tiny.MOE)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "alike", "align": "weights"},
        {
            "method": "alike",
            "combine": "svd",
            "rank_energy": 0.9,
            "router": "mean",
            "align": "none",
        },
        {"method": "alike", "combine": "ties"},
    ],
    ids=["mean", "svd", "ties"],
)
def test_merge(
    options: dict[str, Any], family: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    source = models(family)
    report = moetool.merge(str(source), str(tmp_path / "out"), ratio=0.5, **options)
    decided = read(tmp_path / "out" / "decisions.json")
    assert decided.as_json() == report["decisions"]
    assert {len(layer.groups) for layer in decided.layers.values()} == {4} and all(
        sum(map(len, layer.groups)) == 8 for layer in decided.layers.values()
    )
    how = {
        "how": {"alike": "mean"}.get(options.get("combine", "alike"), options.get("combine")),
        "energy": 0.9,
        "density": 0.2,
    }
    rule = Rule(how, options.get("router", "centroid"), "F32")
    close(
        logits(tmp_path / "out"),
        expected(
            source,
            decided.layers,
            lambda n, block, layer: merged_block(block, layer, rule),
        ),
    )
    assert (
        moetool.verify(str(tmp_path / "out"), against=[str(source)])["bytes"]["computed_tensors"]
        > 0
    )


@pytest.mark.parametrize(
    "method", ["hc-smoe", "m-smoe", "sub-moe", "sub-moe-whitened", "ream", "mergemoe"]
)
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_moe"])
def test_merge_methods(
    method: str, family: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = models(family)
    report = moetool.merge(
        str(source),
        str(tmp_path / "out"),
        ratio=0.5,
        method=method,
        calibrate=[str(text)],
        tokens=400,
        seq_len=40,
        sample=200,
    )
    assert (
        report["experts_after"] == 4
        and report["expert_bytes_after"] * 2 == report["expert_bytes_before"]
    )
    assert torch.isfinite(logits(tmp_path / "out")).all()
    checked = moetool.verify(str(tmp_path / "out"), against=[str(source)])
    assert checked["verified"] == "bytes" and "sealed_tensors" in checked["bytes"]
    assert all(r["error_after"] < r["error_before"] for r in report["refit"].values())


@pytest.mark.parametrize(
    "method",
    [
        "frequency",
        "gate-mass",
        "ean",
        "easy-ep",
        "naee",
        "router-distance",
        "random",
        "stun",
        "mone",
    ],
)
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_moe"])
def test_prune_methods(
    method: str, family: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = models(family)
    options = {"total_sparsity": 0.5} if method == "stun" else {}

    def call():
        return moetool.prune(
            str(source),
            str(tmp_path / "out"),
            ratio=0.25,
            refit=False,
            method=method,
            calibrate=[str(text)],
            tokens=400,
            seq_len=40,
            sample=200,
            **options,
        )

    if method == "mone" and family != "gpt_oss":
        with pytest.raises(moetool.MoetoolError, match="cannot be constants") as refused:
            call()
        assert refused.value.where["expected"] == "gpt_oss or openai_privacy_filter"
        return
    report = call()
    out = logits(tmp_path / "out")
    if method == "mone":
        assert report["experts_after"] == 8
        return
    decided = Decided.from_json(report["decisions"])
    assert report["experts_after"] == 6
    if method == "stun":
        assert 0.45 < zero_share(tmp_path / "out", 8) < 0.55
    else:
        close(
            out,
            expected(
                source, decided.layers, lambda n, block, layer: block.with_experts(layer.leads)
            ),
        )
    moetool.verify(str(tmp_path / "out"), against=[str(source)])


def zero_share(folder: Path, experts: int) -> float:
    """Share of the original's expert weights that are gone or zero."""
    mixture = Mixture.of(Checkpoint.open(folder))
    gone = kept = 0
    for layer in mixture.layers:
        block = blocks.read(mixture, layer)
        for t in (block.experts.gate_up, block.experts.down):
            kept += int((t != 0).sum())
            gone += t.numel() // t.shape[0] * experts
    return 1 - kept / gone


def test_mone_leaves_the_mean_output_behind(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = models("gpt_oss")
    report = moetool.prune(
        str(source),
        str(tmp_path / "out"),
        ratio=0.25,
        method="mone",
        calibrate=[str(text)],
        tokens=10**6,
        seq_len=40,
        protect=False,
    )
    decided = Decided.from_json(report["decisions"])
    after = Mixture.of(Checkpoint.open(tmp_path / "out"))
    for number, layer in decided.layers.items():
        assert len(layer.constant) == 2
        block = blocks.read(after, number)
        for e in layer.constant:
            assert (
                not block.experts.gate_up[e].any()
                and block.experts.down_bias is not None
                and block.experts.down_bias[e].any()
            )
            x = torch.randn(3, 64)
            made = block.experts.out(block.experts.hidden(x, e), e)
            assert torch.equal(made[0], made[2])


# Router rows that the layout data cannot count (zero and shared experts): LongCat is among the tiny
# models above.
UNKNOWN_ROWS = {"deepseek_v4", "inkling_mm_model", "inkling_text", "longcat_flash"}


@pytest.mark.parametrize(
    "family",
    [
        f
        for f in families()["moe"]
        if f not in {*ODD, *UNKNOWN_ROWS, "ernie4_5_vl_moe", "switch_transformers"}
    ],
)
def test_every_family_is_cut_by_name(family: str, tmp_path: Path) -> None:
    """From its layout alone: without text 4 experts become 2, and names and shapes are those of a
    config that says 2.
    """
    layout = Layout.load(family)
    config = make(layout, tmp_path / "model")
    plain = json.dumps(config)
    for group in re.findall(r"n_group|num_expert_group|topk_group", json.dumps(layout.defaults)):
        config[group] = 1
    (tmp_path / "model" / "config.json").write_text(json.dumps(config if plain else {}))
    mixture = Mixture.of(Checkpoint.open(tmp_path / "model"))
    told: dict[str, Any] = {"ratio": 0.5, "method": "router-distance"}
    if mixture.side(mixture.layers[0], "router") is None:
        with pytest.raises(moetool.MoetoolError, match="router"):
            moetool.prune(str(tmp_path / "model"), str(tmp_path / "out"), **told)
        return
    report = moetool.prune(str(tmp_path / "model"), str(tmp_path / "out"), **told)
    assert report["experts_after"] == 2
    after = Mixture.of(Checkpoint.open(tmp_path / "out"))
    assert (
        after.experts == 2
        and moetool.verify(str(tmp_path / "out"))["structure"]["names_checked"] >= 10
    )
    assert config["model_type"] == family


def test_families_that_cannot_be_cut_say_why(tmp_path: Path) -> None:
    for family, said in (
        ("ernie4_5_vl_moe", "inner axis"),
        ("switch_transformers", "no experts found"),
        ("llama", "has no experts"),
    ):
        make(Layout.load(family), tmp_path / family)
        with pytest.raises(moetool.MoetoolError, match=said):
            moetool.prune(str(tmp_path / family), str(tmp_path / "out"), ratio=0.5)


def with_mtp(folder: Path, out: Path) -> Path:
    """A DeepSeek-V3 with an MTP layer behind the last: its experts must go with the others."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    beyond = {
        n.replace("layers.3.", "layers.4."): t.clone() + 0.01
        for n, t in tensors.items()
        if "layers.3." in n
    }
    out.mkdir()
    save_file(
        {**tensors, **beyond, "model.layers.4.eh_proj.weight": torch.randn(64, 128)},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return out


def test_mtp_layers_are_cut_too(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = with_mtp(models("deepseek_v3"), tmp_path / "mtp")
    assert Mixture.of(Checkpoint.open(source)).mtp_layers == (4,)
    report = moetool.prune(
        str(source),
        str(tmp_path / "out"),
        ratio=0.25,
        calibrate=[str(text)],
        tokens=400,
        seq_len=40,
    )
    made = Checkpoint.open(tmp_path / "out")
    assert any("MTP" in w for w in report["warnings"])
    for layer in (1, 4):
        assert made.tensors[f"model.layers.{layer}.mlp.gate.weight"].shape == (
            6,
            64,
        ) and made.tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"].shape == (6,)
        assert sum(f"layers.{layer}.mlp.experts." in n for n in made.tensors) == 18
    assert "model.layers.4.eh_proj.weight" in made.tensors


def test_id_tables_are_renumbered(tmp_path: Path) -> None:
    """DeepSeek-V4's table of expert ids by token, its router (whose shape the layout does not
    know) and its bias.
    """
    from safetensors.torch import load_file, save_file

    make(Layout.load("deepseek_v4"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = next(
        s.name for s in Layout.load("deepseek_v4").tensors if s.name.endswith("tid2eid")
    ).replace("{layer}", "1")
    table = torch.stack([torch.randperm(4)[:2] for _ in range(50)]).long()
    for layer in range(3):
        tensors[f"model.layers.{layer}.ffn.gate.weight"] = torch.randn(4, 32)
    tensors["model.layers.0.ffn.gate.bias"] = torch.randn(4)
    save_file(
        {**tensors, name: table},
        tmp_path / "model" / "model.safetensors",
        metadata={"format": "pt"},
    )
    report = moetool.prune(
        str(tmp_path / "model"), str(tmp_path / "out"), ratio=0.5, method="random"
    )
    made = load_file(tmp_path / "out" / "model.safetensors")
    new = made[name]
    assert made["model.layers.0.ffn.gate.bias"].shape == (2,) and made[
        "model.layers.2.ffn.gate.weight"
    ].shape == (2, 32)
    keep = report["decisions"]["layers"]["1"]["keep"]
    assert new.shape == table.shape and int(new.max()) == 1 and (new[:, 0] != new[:, 1]).all()
    both = torch.tensor([set(row.tolist()) == set(keep) for row in table])
    assert both.any() and all(
        keep[int(b)] == int(a) for a, b in zip(table[both][:, 0], new[both][:, 0], strict=True)
    )


@pytest.mark.parametrize("layout", ["zeroed", "ghost", "ragged"])
def test_other_numbers_in_each_layer(
    layout: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """ghost is exact with a correction bias, zeroed loads everywhere, ragged is of moetool's own
    type.
    """
    source = models("glm4_moe")
    report = moetool.prune(
        str(source),
        str(tmp_path / "out"),
        ratio=0.25,
        budget="sensitivity",
        uneven=layout,
        refit=False,
        calibrate=[str(text)],
        tokens=400,
        seq_len=40,
    )
    decided = Decided.from_json(report["decisions"])
    counts = [layer.count for layer in decided.layers.values()]
    assert sum(counts) == 18 and len(set(counts)) > 1 and min(counts) >= 3
    want = expected(source, decided.layers, lambda n, block, layer: block.with_experts(layer.leads))
    if layout == "ghost":
        close(logits(tmp_path / "out"), want)
        assert Mixture.of(Checkpoint.open(tmp_path / "out")).experts == max(counts)
    elif layout == "zeroed":
        assert (
            torch.isfinite(logits(tmp_path / "out")).all()
            and report["experts_before"] == Mixture.of(Checkpoint.open(tmp_path / "out")).experts
        )
    else:
        loaded = moetool.load(tmp_path / "out", dtype="float32").eval()
        with torch.no_grad():
            close(loaded(input_ids=torch.from_numpy(IDS)).logits, want)
        walk = Walk(Checkpoint.open(tmp_path / "out"), TEXT, Budget())
        walk.run()
        close(walk.logits(0, 0, 24), want)
    moetool.verify(str(tmp_path / "out"), against=[str(source)])


@pytest.mark.parametrize(
    ("family", "named", "counts"),
    [
        ("mixtral", (), "ragged"),
        ("mixtral", ("transformers5",), "ragged"),
        ("glm4_moe", ("vllm",), "ghost"),
        ("glm4_moe", ("transformers5", "mlx"), "ghost"),
    ],
)
def test_a_budget_needs_no_more_words(
    family: str, named: tuple[str, ...], counts: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """--uneven auto: ragged where it is read, else what is exact."""
    source, out, numbers = models(family), tmp_path / "out", tmp_path / "numbers.jsonl"
    rows = np.random.default_rng(3).integers(3, 90, (6, 40)).tolist()
    numbers.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    told = {"calibrate": [str(numbers)], "tokens": 240, "seq_len": 40, "refit": False}
    told |= {"ratio": 0.3, "budget": "sensitivity", "for_": named}
    report = moetool.prune(str(source), str(out), **told)
    assert report["counts"] == counts and len(report["experts_after"]) > 1
    layers = Decided.from_json(report["decisions"]).layers
    want = expected(source, layers, lambda n, block, layer: block.with_experts(layer.leads))
    with torch.no_grad():
        loaded = moetool.load(out, dtype="float32").eval()
        close(loaded(input_ids=torch.from_numpy(IDS)).logits, want)


@pytest.mark.parametrize(
    ("family", "uneven", "hint"),
    [("mixtral", "auto", "budget uniform; --uneven zeroed"), ("glm4_moe", "ragged", "ghost pads")],
)
def test_clients_without_layers_of_their_own_numbers(
    family: str, uneven: str, hint: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Refused before any text is looked at (this one is not there), with what to say instead."""
    told = {"budget": "global", "uneven": uneven, "for_": ("vllm",), "calibrate": ["none"]}
    with pytest.raises(moetool.UsageError, match="other numbers of experts") as refused:
        moetool.prune(str(models(family)), str(tmp_path / "out"), **told)
    assert hint in str(refused.value)


def test_ghosts_need_a_bias(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(moetool.UsageError, match="selection bias"):
        moetool.prune(
            str(models("mixtral")),
            str(tmp_path / "out"),
            budget="sensitivity",
            uneven="ghost",
            calibrate=[str(text)],
            tokens=400,
            seq_len=40,
            method="frequency",
        )


@pytest.mark.parametrize(
    ("family", "ratio", "said"),
    [
        ("qwen3_moe", 0.8, "too few experts"),
        ("mixtral", 0.9, "too few experts"),
        ("deepseek_v3", 0.5, None),
        ("deepseek_v2", 0.75, "too few experts"),
        ("longcat_flash", 0.95, None),
    ],
)
def test_fewer_than_top_k_is_refused_before_any_work(
    family: str, ratio: float, said: str | None, models: Callable[..., Path], tmp_path: Path
) -> None:
    def call():
        return moetool.prune(
            str(models(family)), str(tmp_path / "out"), ratio=ratio, method="random"
        )

    if said is None:
        assert call()["experts_after"] >= 1
        return
    with pytest.raises(moetool.MoetoolError, match=said) as refused:
        call()
    assert "at least" in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "dots1"])
def test_groups_stay_balanced(
    family: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    report = moetool.prune(
        str(models(family)),
        str(tmp_path / "out"),
        ratio=0.5,
        calibrate=[str(text)],
        tokens=400,
        seq_len=40,
        method="frequency",
    )
    groups = Mixture.of(Checkpoint.open(models(family))).groups
    for layer in Decided.from_json(report["decisions"]).layers.values():
        assert (
            len({sum(e // (8 // groups) == g for e in layer.leads) for g in range(groups)}) == 1
            and layer.count == 4
        )


@pytest.mark.parametrize("verb", ["prune", "merge"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_removing_nothing_is_a_copy(
    verb: str, family: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    source = models(family, dtype="bfloat16")
    report = getattr(moetool, verb)(str(source), str(tmp_path / "out"), ratio=0.0)
    assert report["certificate"]["level"] == "exact"
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    from moetool.surgery.spec import whole

    assert all(
        before.read(whole(before.tensors[n])) == after.read(whole(after.tensors[n]))
        and before.tensors[n].dtype == after.tensors[n].dtype
        for n in before.tensors
    )
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out"))
    assert {k: v for k, v in new.items() if k in old} == old


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"combine": "svd", "rank_energy": 1.0},
        {"combine": "ties"},
        {"cluster": "ward", "align": "none"},
        {"router": "mean"},
        {"cluster": "complete", "weigh": "uniform"},
    ],
    ids=str,
)
def test_duplicates_are_found_and_merged_away(
    options: dict[str, Any], models: Callable[..., Path], tmp_path: Path
) -> None:
    """No change of function, and no change of a single weight: identical experts merge to
    themselves.
    """
    source = tiny.twins(
        models("mixtral", num_experts_per_tok=1, dtype="bfloat16"), tmp_path / "twins", router=True
    )
    report = moetool.merge(str(source), str(tmp_path / "out"), ratio=0.5, method="alike", **options)
    for layer in Decided.from_json(report["decisions"]).layers.values():
        assert sorted(tuple(sorted(g)) for g in layer.groups) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    close(logits(tmp_path / "out"), logits(source), 1e-6)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    from moetool.surgery.spec import whole

    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert before.read(whole(before.tensors[name])) == after.read(whole(after.tensors[name]))


def test_kernels_of_a_merged_twin_agree_with_text_methods(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Outputs as features find twins too, whatever their router rows say."""
    source = tiny.twins(models("mixtral", num_experts_per_tok=1), tmp_path / "twins", router=False)
    for method in ("hc-smoe", "sub-moe"):
        report = moetool.merge(
            str(source),
            str(tmp_path / method),
            ratio=0.5,
            method=method,
            joint="1",
            calibrate=[str(text)],
            tokens=400,
            seq_len=40,
            sample=100,
            protect=False,
        )
        for layer in Decided.from_json(report["decisions"]).layers.values():
            assert sorted(tuple(sorted(g)) for g in layer.groups) == [
                (0, 4),
                (1, 5),
                (2, 6),
                (3, 7),
            ]


def test_logsumexp_keeps_the_gates_mass(models: Callable[..., Path], tmp_path: Path) -> None:
    """gpt-oss with twin experts and all experts active: the merged logit holds the mass of both,
    so the function stays.
    """
    from safetensors.torch import load_file, save_file

    folder = models("gpt_oss", num_experts_per_tok=8)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if ".mlp.experts." in name or ".mlp.router." in name:
            tensors[name][4:] = tensors[name][:4]
    (tmp_path / "twins").mkdir()
    save_file(tensors, tmp_path / "twins" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "twins" / "config.json").write_text((folder / "config.json").read_text())
    config = json.loads((tmp_path / "twins" / "config.json").read_text())
    with pytest.raises(moetool.MoetoolError, match="too few"):
        moetool.merge(str(tmp_path / "twins"), str(tmp_path / "out"), ratio=0.5, router="logsumexp")
    block = blocks.read(Mixture.of(Checkpoint.open(tmp_path / "twins")), 0)
    merged = merged_block(
        block,
        Decision(((0, 4), (1, 5), (2, 6), (3, 7))),
        Rule({"how": "mean"}, "logsumexp", "F32"),
    )
    x = torch.randn(20, 64)
    merged = replace(merged, law=replace(block.law, top_k=4))
    close(merged.routed(x, merged.route(x)), block.routed(x, block.route(x)), 1e-5)
    assert config["num_experts_per_tok"] == 8


def test_logsumexp_elsewhere_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(moetool.UsageError, match="bias in the logits") as refused:
        moetool.merge(str(models("mixtral")), str(tmp_path / "out"), router="logsumexp")
    assert refused.value.where["expected"] == "gpt_oss, kolibri1 or openai_privacy_filter"


def test_stacked_files_of_per_expert_families(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """transformers 5 also writes Qwen3-MoE stacked: rows of stacks are cut and merged like single
    tensors.
    """
    source = models("qwen3_moe")
    moetool.convert_layout(str(source), str(tmp_path / "stacked"), to="fused")
    for verb, options in (
        ("prune", {"method": "reap", "calibrate": [str(text)], "tokens": 400, "seq_len": 40}),
        ("merge", {"method": "alike"}),
    ):
        single = getattr(moetool, verb)(
            str(source), str(tmp_path / f"{verb}1"), ratio=0.5, **options
        )
        stacked = getattr(moetool, verb)(
            str(tmp_path / "stacked"), str(tmp_path / f"{verb}2"), ratio=0.5, **options
        )
        assert single["decisions"] == stacked["decisions"] and stacked["layout"] == "fused"
        close(logits(tmp_path / f"{verb}2"), logits(tmp_path / f"{verb}1"), 1e-6)


def test_both_spellings_of_the_count_agree(models: Callable[..., Path], tmp_path: Path) -> None:
    moetool.prune(str(models("qwen3_moe")), str(tmp_path / "out"), ratio=0.25, method="random")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 6
