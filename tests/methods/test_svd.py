"""`--method svd` and `--features svd`: twins by construction, whose neurons were shuffled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_profiles import ids
from safetensors.torch import load_file, save_file

import moetool as api
from moetool import methods
from moetool.kernels.merge import permuted

CUT = {"tokens": 400, "seq_len": 40, "ratio": 0.5}
ROLES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def twins(models: Callable[..., Path], tmp_path: Path) -> str:
    """A Qwen3-MoE whose expert 2 n + 1 is expert 2 n with its neurons shuffled, and a little noise
    on all: nobody's twin is nearer by its plain weights than anybody else.
    """
    source, made = models("qwen3_moe"), tmp_path / "twins"
    tensors = load_file(source / "model.safetensors")
    dice = torch.Generator().manual_seed(1)
    for name in [n for n in tensors if ".experts." in n and n.endswith("down_proj.weight")]:
        stem, expert = name.split(".experts.")[0], int(name.split(".experts.")[1].split(".")[0])
        if expert % 2:
            continue
        own = [tensors[f"{stem}.experts.{expert}.{role}.weight"] for role in ROLES]
        parts = {"gate_up": torch.cat(own[:2]), "down": own[2]}
        order = torch.randperm(own[2].shape[1], generator=dice).tolist()
        twin = permuted(parts, order)
        for role, value in zip(ROLES, (*twin["gate_up"].chunk(2), twin["down"]), strict=True):
            noise = 0.05 * value.std() * torch.randn(value.shape, generator=dice)
            tensors[f"{stem}.experts.{expert + 1}.{role}.weight"] = (value + noise).contiguous()
    made.mkdir()
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    (made / "config.json").write_text((source / "config.json").read_text())
    return str(made)


def kept(report: Any) -> list[list[int]]:
    return [layer["keep"] for layer in report["decisions"]["layers"].values()]


def test_one_of_each_pair_of_twins_stays(twins: str, tmp_path: Path) -> None:
    report = api.prune(twins, str(tmp_path / "out"), method="svd", ratio=0.5)
    assert all([e // 2 for e in layer] == [0, 1, 2, 3] for layer in kept(report))
    assert api.verify(str(tmp_path / "out"), against=[twins])["verified"] == "bytes"


def test_with_text_the_one_of_largest_saliency(twins: str, tmp_path: Path) -> None:
    """Protection or not, the text that was given is looked at."""
    told: dict[str, Any] = {"calibrate": [str(ids(tmp_path))], "protect": False, **CUT}
    report = api.prune(twins, str(tmp_path / "out"), method="svd", **told)
    scores = api.prune(twins, str(tmp_path / "reap"), method="reap", **told)["decisions"]["layers"]
    for number, layer in report["decisions"]["layers"].items():
        score = scores[number]["scores"]
        best = [max((e, e + 1), key=score.__getitem__) for e in range(0, 8, 2)]
        assert layer["keep"] == best


def test_merging_puts_twins_together(twins: str, tmp_path: Path) -> None:
    """Which their plain weights do not show."""
    told: dict[str, Any] = {"ratio": 0.5, "protect": False, "align": "weights"}
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]

    def groups(features: str, **more: Any) -> list[list[list[int]]]:
        out = str(tmp_path / features)
        report = api.merge(twins, out, method="alike", features=features, **told, **more)
        layers = report["decisions"]["layers"].values()
        return [sorted(map(sorted, layer["groups"])) for layer in layers]

    assert all(layer == pairs for layer in groups("svd", rank_energy=0.6))
    assert all(layer != pairs for layer in groups("weights"))


@pytest.mark.parametrize("energy", [0.0, 1.5])
def test_a_share_of_energy_is_a_share(energy: float) -> None:
    with pytest.raises(api.UsageError, match="--rank-energy"):
        methods.make("prune", {"method": "svd", "rank_energy": energy})


def test_rank_energy_goes_with_what_has_a_rank() -> None:
    assert methods.make("merge", {"features": "svd", "rank_energy": 0.5})
    with pytest.raises(api.UsageError, match="--rank-energy does nothing"):
        methods.make("merge", {"features": "weights", "rank_energy": 0.5})


def test_quantized_experts_are_decoded_to_be_compared(twins: str, tmp_path: Path) -> None:
    """What stays moves as it is stored."""
    packed, out = str(tmp_path / "int8"), str(tmp_path / "out")
    api.quantize(twins, packed, format="int8/16", loader_check=False)
    report = api.prune(packed, out, method="svd", ratio=0.5)
    assert all([e // 2 for e in layer] == [0, 1, 2, 3] for layer in kept(report))
    assert api.verify(out, against=[packed])["verified"] == "bytes"


def test_features_that_no_cluster_looks_at_are_said(twins: str, tmp_path: Path) -> None:
    """REAM's first leader takes all four."""
    told: dict[str, Any] = {"calibrate": [str(ids(tmp_path))], "refit": None, **CUT}
    plain = api.merge(twins, str(tmp_path / "a"), method="mergemoe", **told)
    svd = api.merge(twins, str(tmp_path / "b"), method="mergemoe", features="svd", **told)
    ward = api.merge(
        twins, str(tmp_path / "c"), method="mergemoe", features="svd", cluster="ward", **told
    )
    assert svd["decisions"]["layers"].keys() == plain["decisions"]["layers"].keys()
    said = "--features svd changes nothing"
    assert [any(said in w for w in one.get("warnings", ())) for one in (plain, svd, ward)] == [
        0,
        1,
        0,
    ]
