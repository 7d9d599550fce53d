"""Checkpoints made from a layout file alone, for all families: every name is recognised, and
sources convert.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

import moetool
from moetool.surgery.layout import Layout, families
from moetool.surgery.pair import pairs

SIZES = {
    "layers": 3,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "width": 48,
    "expert_width": 16,
    "shared_width": 24,
    "shared_count": 1,
    "experts": 4,
    "top_k": 2,
    "vocab": 50,
}
ALL: list[Any] = [*families()["moe"]]
# of dense families, of which there are many alike, every fourth by default
ALL += [
    pytest.param(n, marks=[pytest.mark.slow] if i % 4 else [])
    for i, n in enumerate(families()["dense"])
]
# Families whose experts are no list of matrices, whose config has no plain count (dbrx keeps it in
# ffn_config), or whose MoE
# layers stand in a pattern string (nemotron_h).
ODD = {"doge", "vitpose_backbone", "dbrx", "nemotron_h"}


def make(layout: Layout, folder: Path) -> dict[str, Any]:
    """Random bytes for every slot that the layout knows the place of; returns the config."""
    text: dict[str, Any] = {
        field: SIZES[meaning] for meaning, field in layout.fields.items() if meaning in SIZES
    }
    known = layout.defaults
    for part in filter(None, layout.text_config.split(".")):
        known = known.get(part) or {}
    text |= {"head_dim": 8} if "head_dim" in known or layout.kind == "dense" else {}
    text |= {
        k: v
        for k, v in {
            "mlp_layer_types": ["sparse"] * 3,
            "first_k_dense_replace": 0,
            "num_dense_layers": 0,
            "moe_layer_start_index": 0,
        }.items()
        if k in known
    }
    if layout.text_config:  # some text models are tied where their config says nothing
        text["tie_word_embeddings"] = False
    config: dict[str, Any] = text
    for part in reversed([p for p in layout.text_config.split(".") if p]):
        config = {part: config}
    config |= {
        "model_type": layout.model_type,
        "architectures": [layout.cls],
        "tie_word_embeddings": False,
    }
    header, data = {}, bytearray()
    for name, shape, _ in layout.slots(config):
        dims = [2 if d is None else d for d in ((2,) if shape is None else shape)]
        size = 2
        for d in dims:
            size *= d
        header[name] = {
            "dtype": "BF16",
            "shape": dims,
            "data_offsets": [len(data), len(data) + size],
        }
        data += bytes(i % 60 for i in range(size))
    body = json.dumps(header).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(body)) + body + data)
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("name", ALL)
def test_inspect_knows_every_name(name: str, tmp_path: Path) -> None:
    layout = Layout.load(name)
    make(layout, tmp_path / "model")
    found = moetool.inspect(str(tmp_path / "model"))
    assert found["family"] == name and found["known"] and found["unknown_tensors"] == []
    if (
        layout.kind == "moe"
        and name not in ODD
        and any(str(s.role).startswith("expert.") and s.layers != "some" for s in layout.tensors)
    ):
        assert found["kind"] == "moe" and found["top_k"] in (2, None)
        assert all(r["experts"] for r in found["layers"] if r["router"])


@pytest.mark.parametrize(
    "pair",
    [p for p in pairs() if not p.inner and p.source not in ("qwen3_5_text", "lfm2")],
    ids=lambda p: f"{p.source}-{p.target}",
)
def test_sources_convert(pair: Any, tmp_path: Path) -> None:
    """qwen3_5_text and lfm2 mix two kinds of layers, whose tensors a layout cannot place alone:
    they are in test_targets.py.
    """
    make(Layout.load(pair.source), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    if pair.source == "stablelm":
        (tmp_path / "model" / "config.json").write_text(
            json.dumps({**config, "partial_rotary_factor": 1.0})
        )
    moetool.upcycle(str(tmp_path / "model"), str(tmp_path / "out"), target=pair.target, experts=4)
    checked = moetool.verify(str(tmp_path / "out"), against=[str(tmp_path / "model")], load=False)
    assert (
        checked["structure"]["names_checked"] > 20
        and max(b["relative"] for b in checked["blocks"]) < 1e-2
    )
