"""Token ids as text for tiny models, and what a profile feeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moetool as api


def ids(folder: Path, *, rows: int = 24, length: int = 40, seed: int = 2) -> Path:
    """A .jsonl of random token ids that every tiny model knows."""
    path = folder / f"ids{seed}.jsonl"
    dice = np.random.default_rng(seed)
    path.write_text(
        "".join(
            json.dumps({"input_ids": dice.integers(10, 150, length).tolist()}) + "\n"
            for _ in range(rows)
        )
    )
    return path


PRUNE = ("easy-ep", "ean", "frequency", "gate-mass", "naee", "reap", "router-distance", "random")
MERGE = ("hc-smoe", "m-smoe", "ream", "sub-moe", "sub-moe-whitened")


def test_one_profile_feeds_every_method(models: Callable[..., Path], tmp_path: Path) -> None:
    """--stats decides as --calibrate on the same text does, without a second pass."""
    source, text = str(models("qwen3_moe")), [str(ids(tmp_path))]
    api.profile(
        source,
        str(tmp_path / "stats"),
        calibrate=text,
        tokens=800,
        seq_len=40,
        sample=200,
        covariance=True,
    )
    common = {"tokens": 800, "seq_len": 40, "sample": 200, "ratio": 0.5}
    for verb, names in (("prune", PRUNE), ("merge", MERGE)):
        for name in names:
            by_text = getattr(api, verb)(
                source, str(tmp_path / f"{name}-text"), method=name, calibrate=text, **common
            )
            by_stats = getattr(api, verb)(
                source,
                str(tmp_path / f"{name}-stats"),
                method=name,
                stats=str(tmp_path / "stats"),
                ratio=0.5,
            )
            assert by_text["decisions"]["layers"].keys() == by_stats["decisions"]["layers"].keys()
            for number, layer in by_text["decisions"]["layers"].items():
                other = by_stats["decisions"]["layers"][number]
                assert layer.get("keep", layer.get("groups")) == other.get(
                    "keep", other.get("groups")
                ), (name, number)
    refit = api.prune(
        source,
        str(tmp_path / "refit"),
        method="reap",
        stats=str(tmp_path / "stats"),
        ratio=0.5,
        refit=True,
    )
    assert all(r["error_after"] < r["error_before"] for r in refit["refit"].values())


def test_a_profile_says_what_it_lacks(models: Callable[..., Path], tmp_path: Path) -> None:
    source, text = str(models("qwen3_moe")), [str(ids(tmp_path))]
    found = api.profile(
        source, str(tmp_path / "stats"), calibrate=text, tokens=400, seq_len=40, sample=0
    )
    assert (
        any("saw fewer than 64 tokens" in w for w in found["warnings"])
        and len(found["summary"]) == 3
    )
    for options, said in (({"method": "naee"}, "hold no sample"),):
        with pytest.raises(api.MoetoolError, match=said):
            api.prune(source, str(tmp_path / "out"), stats=str(tmp_path / "stats"), **options)
    with pytest.raises(api.MoetoolError, match=r"do not hold|hold no sample"):
        api.merge(
            source, str(tmp_path / "out"), method="sub-moe-whitened", stats=str(tmp_path / "stats")
        )
    with pytest.raises(api.MoetoolError, match="another model"):
        api.prune(
            str(models("mixtral")),
            str(tmp_path / "out"),
            method="reap",
            stats=str(tmp_path / "stats"),
        )
    assert (
        api.profile(
            source, str(tmp_path / "stats"), calibrate=text, tokens=400, seq_len=40, sample=0
        )["data_sha256"]
        == found["data_sha256"]
    )
    with pytest.raises(api.MoetoolError, match="statistics of another"):
        api.profile(
            source, str(tmp_path / "stats"), calibrate=text, tokens=200, seq_len=40, sample=0
        )
    with pytest.raises(api.MoetoolError, match="no statistics here"):
        api.prune(source, str(tmp_path / "out"), method="reap", stats=str(tmp_path))


def test_domains_show(models: Callable[..., Path], tmp_path: Path) -> None:
    """Two files that use other experts: the profile keeps them apart."""
    a = tmp_path / "a.jsonl"
    b = tmp_path / "b.jsonl"
    a.write_text("".join(json.dumps({"input_ids": [11] * 40}) + "\n" for _ in range(10)))
    b.write_text("".join(json.dumps({"input_ids": [99] * 40}) + "\n" for _ in range(10)))
    found = api.profile(
        str(models("mixtral")),
        str(tmp_path / "stats"),
        calibrate=[str(a), f"{b}:0.25"],
        tokens=400,
        seq_len=40,
        sample=16,
    )
    shares: list[Any] = [round(d["share"], 2) for d in found["domains"]]
    assert shares == [0.75, 0.25] or abs(shares[1] - 0.25) < 0.1
    assert found["domains"][1]["apart"] > 0.1
